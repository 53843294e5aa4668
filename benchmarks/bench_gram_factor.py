"""gram_factor against the reference and against Cholesky and inverse by torch.linalg, which find no rank."""

import pytest
import torch

from sparse_cl import ops, reference

CASES = {"16 of 40": (16, 40), "16 of 136": (16, 136), "4 of 256": (4, 256), "1 of 1024": (1, 1024)}


def by_linalg(gram, norms, rtol):
    lower = torch.linalg.cholesky(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    return torch.linalg.solve_triangular(lower, identity, upper=False).mT, None


CONTENDERS = {"native": ops.gram_factor, "reference": reference.gram_factor, "cholesky and inverse": by_linalg}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES)
def test_gram_factor(benchmark, device, waiting, case, contender):
    batch, k = CASES[case]
    if contender == "reference" and k > 256:
        pytest.skip("takes a minute")
    torch.manual_seed(0)
    y = torch.randn(batch, 2 * k, k, dtype=torch.float64, device=device)
    gram = y.mT @ y
    norms = gram.diagonal(dim1=-2, dim2=-1).contiguous()
    op = CONTENDERS[contender]
    factor, _ = op(gram, norms, 1e-6)
    facts = {"largest |TtGT - I|": (factor.mT @ gram @ factor - torch.eye(k, device=device)).abs().max().item()}
    benchmark.group = case
    benchmark.extra_info.update(case=case, contender=contender, baseline="cholesky and inverse", **facts)
    benchmark.pedantic(waiting(op), (gram, norms, 1e-6), rounds=3 if contender == "reference" else 9, warmup_rounds=1)
