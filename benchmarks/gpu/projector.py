"""orthonormalize, projection and the refresh of subspaces on a GPU, at the shapes of Llama-3-8B.

    python benchmarks/gpu/projector.py --json out/gpu.json [--tiny]

Times are medians of CUDA events. Where memory does not hold all 32 layers, those that fit are timed and the result is
scaled by the number of layers. A refresh is observe + consolidate of rank 128; peers are timed on one matrix of each
shape, times how many there are.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.bandwidth import LAYERS, layers_that_fit
from benchmarks.gpu.run import DEVICE, Run, free, main, median_ms, once_ms
from sparse_cl import SubspaceMemory, ops
from sparse_cl.linalg import orthonormalize, project_out_

#: (m, n) of the linear layers of a block: q, k, v, o, gate, up, down.
BLOCK = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]


@dataclass
class Sizes:
    """Shapes of a block's layers, rank of a basis, tokens of a pass, blocks of a model and those that fit."""

    block: list[tuple[int, int]]
    rank: int
    tokens: int
    layers: int
    fit: int
    batch: int
    widths: tuple[int, ...]


def sizes(tiny: bool) -> Sizes:
    if tiny:
        return Sizes([(m // 128, n // 128) for m, n in BLOCK], 4, 32, 2, 1, 2, (4, 8))
    # A weight and a gradient in bf16, and what a memory holds of each: under 8 bytes a parameter.
    return Sizes(BLOCK, 128, 8192, LAYERS, layers_that_fit(8), 32, (32, 64, 128, 256))


def orthogonality_error(q: Tensor) -> float:
    wide = q.double()
    return (wide.mT @ wide - torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)).abs().max().item()


def time_orthonormalize(size: Sizes, k: int) -> dict[str, float]:
    n = size.block[0][1]
    y = torch.randn(size.batch, n, k, device=DEVICE)
    old = torch.linalg.qr(torch.randn(size.batch, n, size.rank, device=DEVICE))[0]
    gram = y.double().mT @ y.double()
    norms = gram.diagonal(dim1=-2, dim2=-1).contiguous()
    return {
        "ms": median_ms(lambda: orthonormalize(y)),
        "against_ms": median_ms(lambda: orthonormalize(y, old)),
        "qr_ms": median_ms(lambda: torch.linalg.qr(y), repeats=3, warmup=1),
        "gram_factor_ms": median_ms(lambda: ops.gram_factor(gram, norms, 1e-6)),
        "cholesky_ms": median_ms(lambda: torch.linalg.cholesky_ex(gram)),
        "error": orthogonality_error(orthonormalize(y)[0]),
        "qr_error": orthogonality_error(torch.linalg.qr(y)[0]),
    }


def time_projection(size: Sizes) -> dict[str, float]:
    """One block: the projection of its updates beside bf16 forward and backward of its linear layers."""
    weights = [torch.randn(s, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for s in size.block]
    widths = {n for _, n in size.block}
    inputs = {n: torch.randn(size.tokens, n, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for n in widths}

    def forward_backward() -> None:
        for weight in weights:
            out = inputs[weight.shape[1]] @ weight.mT
            torch.autograd.grad(out, (weight, inputs[weight.shape[1]]), out)

    updates = [torch.randn(s, device=DEVICE) for s in size.block]
    bases = {n: torch.linalg.qr(torch.randn(n, size.rank, device=DEVICE))[0] for n in widths}

    def project(updates: list[Tensor]) -> None:
        for update in updates:
            project_out_(update, bases[update.shape[1]])

    narrow = [u.bfloat16() for u in updates]
    times = {
        "forward_backward_ms": median_ms(forward_backward),
        "projection_fp32_ms": median_ms(lambda: project(updates)),
        "projection_bf16_ms": median_ms(lambda: project(narrow)),
    }
    times["overhead"] = times["projection_fp32_ms"] / times["forward_backward_ms"]
    return times


def time_refresh(size: Sizes) -> dict[str, float]:
    """All linear layers of a model: the first domain's refresh, and the second's, which stays clear of a basis."""
    weights = []
    for i, shape in enumerate(size.block * size.fit):
        weight = torch.nn.Parameter(torch.empty(shape, device=DEVICE, dtype=torch.bfloat16))
        weight.grad = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        weights.append((f"weight{i}", weight))
    times: dict[str, list[float]] = {"observe": [], "first": [], "second": []}
    for number in range(4):
        memory = None  # the one before, which memory may not hold beside this one
        free()
        memory = SubspaceMemory(weights, max_rank=size.rank)
        for name in ("first", "second"):
            # One observation must precede each consolidation; both change the memory, so neither is repeated alone.
            observed, consolidated = once_ms(memory.observe), once_ms(memory.consolidate)
            if number:  # the first round warms up
                times["observe"].append(observed)
                times[name].append(consolidated)
    ms = {f"{name}_ms": statistics.median(found) * size.layers / size.fit for name, found in times.items()}
    return {**ms, "refresh_ms": ms["observe_ms"] + ms["first_ms"], "layers": len(weights), "of": 7 * size.layers}


def time_peers(size: Sizes) -> dict[str, float]:
    """torch.svd_lowrank of all linear layers, and of one square matrix the full SVD that GaLore's projector takes."""
    lowrank = 0.0
    for shape, count in Counter(size.block).items():
        grad = torch.randn(shape, device=DEVICE)
        once = median_ms(lambda g=grad: torch.svd_lowrank(g, size.rank, niter=2), repeats=3, warmup=1)
        lowrank += count * size.layers * once
    square = torch.randn(size.block[0], device=DEVICE)
    full = once_ms(lambda: torch.linalg.svd(square, full_matrices=False))
    return {"svd_lowrank_ms": lowrank, "full_svd_of_one_ms": full}


def cases(run: Run) -> None:
    size = sizes(run.tiny)
    run.case("refresh", partial(time_refresh, size), needs=6)
    run.case("projection", partial(time_projection, size), needs=2)
    for k in size.widths:
        run.case(f"orthonormalize, {k} columns", partial(time_orthonormalize, size, k), needs=3)
    run.case("peers", partial(time_peers, size), needs=8)


if __name__ == "__main__":
    main("projector", __doc__, cases)
