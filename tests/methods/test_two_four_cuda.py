"""The locked track of a 2:4 mask by the GPU's sparse kernels."""

from __future__ import annotations

import pytest
import torch

from sparse_cl.masks import TwoFourMask
from sparse_cl.probes.two_four import only_two_four


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sparse tensor cores are a GPU's")
def test_the_sparse_kernels_compute_the_locked_track():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(256, 128)).cuda().bfloat16()
    groups = torch.rand(128, 64, 4).argsort(-1) < 2
    mask = TwoFourMask(groups.view(128, 256)).to("cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        with only_two_four(layer, {"0.weight": mask}):
            expected = layer(x)
        with only_two_four(layer, {"0.weight": mask}, semi_structured=True):
            found = layer(x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
