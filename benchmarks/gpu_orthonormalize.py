"""orthonormalize, projection and the refresh of subspaces on a GPU, at the shapes of Llama-3-8B.

    python benchmarks/gpu_orthonormalize.py --out results.json

Times are medians of CUDA events. Where memory does not hold all 32 layers, those that fit are timed and the result is
scaled by the number of layers. A refresh is observe + consolidate of rank 128; peers are timed on one matrix of each
shape, times how many there are.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from gpu_masked_adamw import LAYERS, free, layers_that_fit, median_ms, versions
from torch import Tensor

from sparse_cl import SubspaceMemory, ops
from sparse_cl.linalg import orthonormalize, project_out_

DEVICE = "cuda"
RANK, TOKENS = 128, 8192
#: (m, n) of the linear layers of a block: q, k, v, o, gate, up, down.
BLOCK = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]


def orthogonality_error(q: Tensor) -> float:
    wide = q.double()
    return (wide.mT @ wide - torch.eye(q.shape[-1], dtype=torch.float64, device=q.device)).abs().max().item()


def time_orthonormalize(batch: int = 32, n: int = 4096) -> list[dict]:
    rows = []
    for k in (32, 64, 128, 256):
        y = torch.randn(batch, n, k, device=DEVICE)
        old = torch.linalg.qr(torch.randn(batch, n, RANK, device=DEVICE))[0]
        gram = y.double().mT @ y.double()
        norms = gram.diagonal(dim1=-2, dim2=-1).contiguous()
        rows.append(
            {
                "k": k,
                "ms": median_ms(lambda y=y: orthonormalize(y)),
                "against_ms": median_ms(lambda y=y, old=old: orthonormalize(y, old)),
                "qr_ms": median_ms(lambda y=y: torch.linalg.qr(y), repeats=3, warmup=1),
                "gram_factor_ms": median_ms(lambda g=gram, s=norms: ops.gram_factor(g, s, 1e-6)),
                "cholesky_ms": median_ms(lambda g=gram: torch.linalg.cholesky_ex(g)),
                "error": orthogonality_error(orthonormalize(y)[0]),
                "qr_error": orthogonality_error(torch.linalg.qr(y)[0]),
            }
        )
        del y, old, gram, norms
        free()
    return rows


def time_projection() -> dict[str, float]:
    """One block: the projection of its updates beside bf16 forward and backward of its linear layers."""
    weights = [torch.randn(s, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for s in BLOCK]
    inputs = {n: torch.randn(TOKENS, n, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _, n in BLOCK}

    def forward_backward() -> None:
        for weight in weights:
            out = inputs[weight.shape[1]] @ weight.mT
            torch.autograd.grad(out, (weight, inputs[weight.shape[1]]), out)

    updates = [torch.randn(s, device=DEVICE) for s in BLOCK]
    bases = {n: torch.linalg.qr(torch.randn(n, RANK, device=DEVICE))[0] for _, n in BLOCK}

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


def time_refresh(layers: int) -> dict[str, float]:
    """All linear layers of a model: the first domain's refresh, and the second's, which stays clear of a basis."""
    weights = []
    for i, shape in enumerate(BLOCK * layers):
        weight = torch.nn.Parameter(torch.empty(shape, device=DEVICE, dtype=torch.bfloat16))
        weight.grad = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        weights.append((f"weight{i}", weight))
    times: dict[str, list[float]] = {"observe": [], "first": [], "second": []}
    for _ in range(3):
        memory = SubspaceMemory(weights, max_rank=RANK)
        for name in ("first", "second"):
            # One observation must precede each consolidation; both change the memory, so neither is repeated alone.
            times["observe"].append(median_ms(memory.observe, repeats=1, warmup=0))
            times[name].append(median_ms(memory.consolidate, repeats=1, warmup=0))
    ms = {f"{name}_ms": min(measured) * LAYERS / layers for name, measured in times.items()}
    ms["refresh_ms"] = ms["observe_ms"] + ms["first_ms"]
    return ms


def time_peers() -> dict[str, float]:
    """Of all linear layers: torch.svd_lowrank, and the full SVD that GaLore's projector takes of each matrix."""
    total = {"svd_lowrank_ms": 0.0, "full_svd_ms": 0.0}
    for shape, count in Counter(BLOCK).items():
        grad = torch.randn(shape, device=DEVICE)
        lowrank = median_ms(lambda g=grad: torch.svd_lowrank(g, RANK, niter=2), repeats=3, warmup=1)
        full = median_ms(lambda g=grad: torch.linalg.svd(g, full_matrices=False), repeats=1, warmup=0)
        total["svd_lowrank_ms"] += count * LAYERS * lowrank
        total["full_svd_ms"] += count * LAYERS * full
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--layers", type=int, help="blocks that the refresh holds; as many as fit unless given")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() and ops.LOADED["cuda"]):
        raise SystemExit("needs a GPU and the CUDA library")
    torch.manual_seed(0)
    results: dict = {"versions": versions()}
    # A weight and a gradient in bf16, and what a memory holds of each: under 8 bytes a parameter.
    layers = arguments.layers or layers_that_fit(8)
    parts = {
        "orthonormalize": time_orthonormalize,
        "projection": time_projection,
        "refresh": lambda: time_refresh(layers),
        "peers": time_peers,
    }
    print(*(f"{k}: {v}" for k, v in results["versions"].items()), sep="\n", flush=True)
    for name, measure in parts.items():
        results[name] = measure()
        free()
        arguments.out.write_text(json.dumps(results, indent=1))
        rows = results[name] if isinstance(results[name], list) else [results[name]]
        for row in rows:
            print(f"{name}: " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
