"""project_out_ against its two matrix products alone, and against the textbook formula; with the memory at the peak.

Parameters are as wide as Llama-3-8B's; the products are the least that any projection must do.
"""

import pytest
import torch
from peak_memory import peak_mib

from sparse_cl.linalg import project_out_

# Name: rows, columns, rank of the basis, dtype.
CASES = {
    "4096 x 4096, rank 128": (4096, 4096, 128, torch.float32),
    "4096 x 4096, rank 1024": (4096, 4096, 1024, torch.float32),
    "4096 x 14336, rank 128": (4096, 14336, 128, torch.float32),
    "4096 x 4096, rank 128, bf16": (4096, 4096, 128, torch.bfloat16),
}


def two_products(x, basis):
    """The products into memory that is there already; in bf16 of as many rows of float32."""
    wide = x.float()
    coefficients, target = wide.new_empty(x.shape[0], basis.shape[1]), torch.empty_like(wide)

    def call():
        torch.mm(wide, basis, out=coefficients)
        torch.mm(coefficients, basis.mT, out=target)

    return call


def textbook(x, basis):
    def call():
        x.copy_(x.float() - (x.float() @ basis) @ basis.mT)

    return call


CONTENDERS = {"ours": lambda x, u: lambda: project_out_(x, u), "two products": two_products, "textbook": textbook}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES)
def test_project_out(benchmark, device, waiting, case, contender):
    rows, columns, rank, dtype = CASES[case]
    torch.manual_seed(0)
    x = torch.randn(rows, columns, device=device).to(dtype)
    basis = torch.linalg.qr(torch.randn(columns, rank, device=device))[0]
    call = CONTENDERS[contender](x, basis)
    benchmark.group = case
    facts = {"peak MiB": round(peak_mib(call, device), 1), "x MiB": x.nbytes / 2**20}
    benchmark.extra_info.update(case=case, contender=contender, baseline="two products", **facts)
    benchmark.pedantic(waiting(call), rounds=5, warmup_rounds=1)
