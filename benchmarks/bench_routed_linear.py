"""RoutedLinear's branch, forward and backward, at several k beside the same branch through all neurons.

Run: ``pytest benchmarks/bench_routed_linear.py``. The layer is that out of an MLP's neurons, of a 5 M and of a 270 M
model. The branch reads and writes k columns a token, so its cost follows k; a dense product uses the processor better,
so at a large k it is the faster way to the same numbers.
"""

import pytest
import torch
from torch import nn

from sparse_cl.nn import route

# Name: neurons, outputs, tokens.
SHAPES = {"704 -> 256": (704, 256, 1024), "2048 -> 640": (2048, 640, 1024)}
SHARES = {"all neurons": 1.0, "1/4": 0.25, "1/10": 0.1, "1/40": 0.025}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(benchmark, device, waiting, shape, share):
    neurons, outputs, tokens = SHAPES[shape]
    torch.manual_seed(0)
    with device:
        model = nn.Sequential(nn.Linear(neurons, outputs, bias=False))
        h, upstream = torch.randn(tokens, neurons, requires_grad=True), torch.randn(tokens, outputs)
    k = max(1, int(SHARES[share] * neurons))
    route(model, {"0": None}, k, routing="none" if k == neurons else "top")
    layer = model[0]

    def call():
        layer.columns.grad = h.grad = None
        layer.branch(h).backward(upstream)

    benchmark.group = shape
    benchmark.extra_info.update(case=shape, contender=share, baseline="all neurons")
    benchmark.pedantic(waiting(call), rounds=9, warmup_rounds=1)
