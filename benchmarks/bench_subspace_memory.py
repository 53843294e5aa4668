"""Refresh of a subspace of rank 128, observe + consolidate, against what finds one otherwise, on the CPU.

Run: ``pytest benchmarks/bench_subspace_memory.py`` (``-k 2048`` for a part). Gradients have singular values i^-1, as
those of small language models do. ``energy`` is the share of a gradient's energy that the found directions hold; time
says little without it. GaLore's projector and PEFT's OSF are a full SVD each, so they run on the smallest shape only.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from sparse_cl import SubspaceMemory

RANK = 128
# Of Llama-3-8B: k and v, halved; up and gate, halved; q and o.
SHAPES = [(2048, 2048), (7168, 2048), (4096, 4096)]


def observe_and_consolidate(grad):
    """All that a refresh needs, from a new memory on."""
    weight = torch.nn.Parameter(torch.empty_like(grad))
    weight.grad = grad
    memory = SubspaceMemory([("weight", weight)], max_rank=RANK, energy=1.0)
    memory.observe()
    memory.consolidate()
    return memory.basis("weight")


def svd_lowrank(grad):
    return torch.svd_lowrank(grad, q=RANK, niter=2)[2]


def full_svd(grad):
    return torch.linalg.svd(grad, full_matrices=False)[2][:RANK].mT


def gram_eigh(grad):
    return torch.linalg.eigh(grad.mT @ grad)[1][:, -RANK:]


def galore(grad):
    # By its file: the package itself imports bitsandbytes.
    package = importlib.util.find_spec("galore_torch")
    if package is None:
        pytest.skip("galore-torch is not installed")
    spec = importlib.util.spec_from_file_location("projector", Path(package.origin).with_name("galore_projector.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    projector = module.GaLoreProjector(RANK, proj_type="right")
    projector.project(grad, 0)
    return projector.ortho_matrix.mT


def osf(grad):
    utils = pytest.importorskip("peft.tuners.osf.utils", reason="peft is not installed")
    return utils.decompose_weight_matrix(grad, RANK)["V_high"].mT


# Name: what it calls, rounds, the shapes on which it runs.
CONTENDERS = {
    "SubspaceMemory": (observe_and_consolidate, 9, SHAPES),
    "torch.svd_lowrank": (svd_lowrank, 9, SHAPES),
    "eigh of the Gram matrix": (gram_eigh, 1, SHAPES[:2]),
    "torch.linalg.svd": (full_svd, 1, SHAPES),
    "GaLore": (galore, 1, SHAPES[:1]),
    "PEFT OSF": (osf, 1, SHAPES[:1]),
}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def gradient(request):
    """(m, n) float32 with singular values near i^-1 between random singular vectors."""
    m, n = request.param
    generator = torch.Generator().manual_seed(0)
    singular = 1 / torch.arange(1, n + 1)
    left, right = (torch.randn(size, n, generator=generator) / size**0.5 for size in (m, n))
    return (left * singular) @ right.mT


@pytest.mark.parametrize("contender", CONTENDERS)
def test_refresh(benchmark, gradient, contender):
    refresh, rounds, shapes = CONTENDERS[contender]
    if tuple(gradient.shape) not in shapes:
        pytest.skip("full decompositions take long; see the smallest shape")
    torch.manual_seed(0)
    case = "{} x {}, rank {}".format(*gradient.shape, RANK)
    basis = benchmark.pedantic(refresh, args=(gradient,), rounds=rounds, warmup_rounds=int(rounds > 1))
    energy = float((gradient @ basis).double().square().sum() / gradient.double().square().sum())
    benchmark.group = case
    facts = {"energy": round(energy, 5)}
    benchmark.extra_info.update(case=case, contender=contender, baseline="torch.svd_lowrank", **facts)
