"""orthonormalize against batched torch.linalg.qr, which removes no old basis and finds no rank."""

import pytest
import torch

from sparse_cl.linalg import orthonormalize

# Name: batch, rows, columns, rank of the basis to stay clear of.
CASES = {
    "8 x 4096 x 32": (8, 4096, 32, 0),
    "8 x 4096 x 64": (8, 4096, 64, 0),
    "8 x 4096 x 128": (8, 4096, 128, 0),
    "2 x 14336 x 128": (2, 14336, 128, 0),
    "8 x 4096 x 128, against 512": (8, 4096, 128, 512),
}
CONTENDERS = ["ours", "torch.linalg.qr"]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES)
def test_orthonormalize(benchmark, device, waiting, case, contender):
    batch, n, k, r = CASES[case]
    torch.manual_seed(0)
    y = torch.randn(batch, n, k, device=device)
    old = torch.linalg.qr(torch.randn(batch, n, r, device=device))[0] if r else None

    def call():
        return orthonormalize(y, old)[0] if contender == "ours" else torch.linalg.qr(y)[0]

    wide = call().double()
    facts = {"largest |QtQ - I|": (wide.mT @ wide - torch.eye(k, device=device)).abs().max().item()}
    benchmark.group = case
    benchmark.extra_info.update(case=case, contender=contender, baseline="torch.linalg.qr", **facts)
    benchmark.pedantic(waiting(call), rounds=5, warmup_rounds=1)
