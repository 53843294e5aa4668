"""Projected optimizers and `protect` on parameters that FSDP2 or HSDP has split, against one process."""

from __future__ import annotations

import pytest
import torch
from cases.rules import N, basis, drift, energies, random
from cases.sharded import make_all, outcomes, start
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sparse_cl import (
    ColumnMask,
    ElasticAdamW,
    ElementMask,
    LowRankPull,
    ProjectedAdamW,
    RowMask,
    Subspace,
    SubspaceMemory,
    SubspaceProjectedAdamW,
    protect,
)

PROCESSES = 4
CHECKS = {}
#: Rows that 4 processes share evenly, unevenly, and that are fewer than there are processes.
SHAPES = {"even": (8, N), "uneven": (9, N), "few": (2, N), "bias": (7,)}
RULES = {"pull": {"strength": 5.0}, "budget": {"budget": 1e-3}, "hard": {"budget": 0.0}}


def check(function):
    CHECKS[function.__name__] = function
    return function


def work(rank, folder):
    make_all(rank, PROCESSES, folder, CHECKS)


def subspaces(dtype):
    return {
        name: Subspace(basis().to(dtype), energies().to(dtype)) for name, shape in SHAPES.items() if len(shape) == 2
    }


def masks_of(kind):
    if kind == "rows":
        return {"even": RowMask([5], SHAPES["even"]), "uneven": RowMask([0, 4, 8], SHAPES["uneven"])}
    if kind == "columns":
        return {name: ColumnMask(range(0, N, 3), SHAPES[name]) for name in ("even", "few")}
    return {"even": ElementMask(random(*SHAPES["even"]) > 0)} if kind == "elements" else {}


def meshes():
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "fsdp"))
    return {"flat": (init_device_mesh("cpu", (4,)), [Shard(0)]), "hsdp": (square, [Replicate(), Shard(0)])}


def pair(mesh, placements, dtype=torch.float64):
    """The same parameters whole and split."""
    values = {name: random(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    split = {name: nn.Parameter(distribute_tensor(v.clone(), mesh, placements)) for name, v in values.items()}
    return {name: nn.Parameter(v) for name, v in values.items()}, split


def run(one, many, optimizers, steps=4, first=0):
    for step in range(first, first + steps):
        for i, (name, param) in enumerate(one.items()):
            param.grad = random(*param.shape, seed=1000 * i + step).to(param.dtype)
            split = many[name]
            split.grad = distribute_tensor(param.grad.clone(), split.device_mesh, split.placements)
        for optimizer in optimizers:
            optimizer.step()


def assert_equal(one, many, atol=1e-12):
    for name, param in one.items():
        torch.testing.assert_close(
            many[name].full_tensor(), param.detach(), rtol=0, atol=atol, msg=lambda m, n=name: n + m
        )


def elastic(params, rule, masks=None, **options):
    params = list(params.items())
    return ElasticAdamW(params, lr=1e-2, memory=subspaces(params[0][1].dtype), masks=masks, **RULES[rule], **options)


@check
def every_rule_steps_as_in_one_process(folder):
    for mesh, placements in meshes().values():
        for rule in RULES:
            for kind in ("dense", "rows", "columns", "elements"):
                if (kind == "elements" and rule == "budget") or (len(placements) > 1 and kind != "rows"):
                    continue
                one, many = pair(mesh, placements)
                optimizers = [elastic(params, rule, masks_of(kind)) for params in (one, many)]
                run(one, many, optimizers)
                assert_equal(one, many)
                drifts = [optimizer.old_output_drift() for optimizer in optimizers]
                assert drifts[1] == pytest.approx(drifts[0], rel=1e-9, abs=1e-15)
                if kind in ("dense", "rows"):
                    for optimizer in optimizers:
                        optimizer.set_masks(masks_of("rows" if kind == "dense" else "dense"))
                    run(one, many, optimizers, first=4)
                    assert_equal(one, many)


@check
def later_corrections_step_as_in_one_process(folder):
    for rule in RULES:
        one, many = pair(*meshes()["flat"])
        optimizers = [elastic(params, rule, masks_of("rows"), every=2) for params in (one, many)]
        run(one, many, optimizers)
        assert_equal(one, many)


@check
def the_hook_corrects_as_in_one_process(folder):
    for mesh, placements in meshes().values():
        for rule in RULES:
            one, many = pair(mesh, placements)
            optimizers = [torch.optim.AdamW(params.items(), lr=1e-2) for params in (one, many)]
            hooks = [protect(optimizer, subspaces(torch.float64), **RULES[rule]) for optimizer in optimizers]
            run(one, many, optimizers)
            assert_equal(one, many)
            assert hooks[1].old_output_drift() == pytest.approx(hooks[0].old_output_drift(), rel=1e-9, abs=1e-15)


@check
def bounds_hold_in_float32_and_bfloat16(folder):
    for dtype in (torch.float32, torch.bfloat16):
        for rule in ("budget", "hard"):
            one, many = pair(*meshes()["flat"], dtype)
            start = {name: param.detach().double() for name, param in one.items()}
            given = {name: Subspace(basis().float(), energies().float()) for name in subspaces(torch.float32)}
            made = ElasticAdamW(many.items(), lr=1e-2, weight_decay=0.1, memory=given, **RULES[rule])
            for step in range(8):
                run(one, many, [made], 1, step)
                for name, s in given.items():
                    stepped = made.state[many[name]].get("master", many[name].to_local())
                    own = torch.nn.functional.pad(stepped.detach().double(), (0, 0, 0, 9 - len(stepped)))
                    parts = [torch.zeros_like(own) for _ in range(PROCESSES)]
                    torch.distributed.all_gather(parts, own)
                    sizes = [len(part) for part in torch.empty(SHAPES[name]).chunk(PROCESSES)] + [0] * PROCESSES
                    now = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=False)])
                    moved = now - start[name]
                    if rule == "budget":
                        assert drift(now, start[name], s) <= 1e-3 * (1 + 1e-5)
                    else:
                        assert (moved @ basis()).square().sum() <= 1e-6 * moved.square().sum()


class Net(nn.Module):
    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.layer(self.embed(ids))))


def trained(tied, rule, kind, mesh=None, domains=2):
    """Two domains of a model, in one process or split over all, each of which sees a quarter of the tokens."""
    from torch.distributed.fsdp import fully_shard

    model = Net(tied).double()
    if mesh is not None:
        for part in (model.layer, model) if tied else (model.embed, model.layer, model):
            fully_shard(part, mesh=mesh)
    memory = SubspaceMemory(model, max_rank=4, source="inputs")
    rank, count = (0, 1) if mesh is None else (torch.distributed.get_rank(), PROCESSES)
    ids = torch.randint(0, 7, (domains, 16), generator=torch.Generator().manual_seed(3)).chunk(count, 1)[rank]
    for domain in range(domains):
        if kind == "protect":
            optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
            if domain:
                hook = protect(optimizer, memory, row_strength=0.5, **RULES[rule])
        else:
            hook = optimizer = ElasticAdamW(
                model.named_parameters(), lr=1e-2, memory=memory, row_strength=0.5, **RULES[rule]
            )
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(ids[domain]), (ids[domain] + 1) % 10)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with memory.watch(), torch.no_grad():
            model(ids[domain])
        if mesh is not None:
            model.reshard()  # or its root would stay whole until the next backward pass
        memory.observe()
        said = hook.old_output_drift() if domain else {}
        memory.consolidate()
    return model, said


@check
def two_domains_of_a_model_with_an_embedding(folder):
    mesh = init_device_mesh("cpu", (4,))
    for tied in (False, True):
        for rule in RULES:
            for kind in ("fused", "protect") if rule == "budget" else ("fused",):
                alone, expected = trained(tied, rule, kind)
                model, said = trained(tied, rule, kind, mesh)
                whole = {name: param.full_tensor() for name, param in model.named_parameters()}
                for name, param in alone.named_parameters():
                    torch.testing.assert_close(
                        whole[name], param.detach(), rtol=0, atol=1e-6, msg=lambda m, n=name: n + m
                    )
                assert said == pytest.approx(expected, rel=1e-4, abs=1e-12), (tied, rule, kind)


def resharded(save, load, folder):
    """What `save` gives is saved by one set of processes and loaded into what `load` gives."""
    import torch.distributed.checkpoint as dcp

    dcp.save({"o": save.state_dict()}, checkpoint_id=folder)
    state = {"o": load.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    load.load_state_dict(state["o"])


@check
def checkpoints_go_on_bit_for_bit(folder):
    for number, (fused, later) in enumerate(((True, 1), (True, 2), (False, 1))):
        one, many = pair(*meshes()["flat"])

        def make(params, fused=fused, every=later):
            if fused:
                return elastic(params, "budget", masks_of("rows"), every=every)
            optimizer = torch.optim.SGD(params.items(), lr=1e-2)
            return optimizer, protect(optimizer, subspaces(torch.float64), budget=1e-3)

        made = [make(params) for params in (one, many)]
        run(one, many, [m if fused else m[0] for m in made], 5)
        again_one, again_many = pair(*meshes()["hsdp"])
        twins = [make(params) for params in (again_one, again_many)]
        run(again_one, again_many, [m if fused else m[0] for m in twins], 1)
        for name in one:
            with torch.no_grad():
                again_one[name].copy_(one[name])
                again_many[name].copy_(distribute_tensor(one[name].detach(), *meshes()["hsdp"]))
        # From four processes to two twice, and to one.
        for i, twin in enumerate(twins):
            resharded(*[m if fused else m[1] for m in (made[1], twin)], folder / f"{number}-{i}")
        optimizers = [m if fused else m[0] for m in (made[0], *twins)]
        for step in range(5, 8):
            for params in (one, again_one, again_many):
                for i, (name, param) in enumerate(params.items()):
                    grad = random(*SHAPES[name], seed=1000 * i + step)
                    split = hasattr(param, "placements")
                    param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if split else grad
            for optimizer in optimizers:
                optimizer.step()
        assert_equal(one, again_many)
        for name, param in one.items():
            torch.testing.assert_close(again_one[name], param, rtol=0, atol=1e-12)


@check
def refusals_name_the_parameter(folder):
    mesh = init_device_mesh("cpu", (4,))
    weight = nn.Parameter(distribute_tensor(random(8, N).float(), mesh, [Shard(1)]))
    given = {"w": Subspace(basis().float())}
    for made in (
        lambda: SubspaceProjectedAdamW([("w", weight)], memory=given),
        lambda: protect(torch.optim.AdamW([("w", weight)]), given, budget=0),
    ):
        with pytest.raises(ValueError, match="'?w'? is split over processes along its inputs"):
            made()
    rank = torch.distributed.get_rank()
    split = nn.Parameter(distribute_tensor(random(8, N).float(), mesh, [Shard(0)]))
    pull = LowRankPull(basis().float(), energies(most=300.0 + rank).float())
    optimizer = ProjectedAdamW([("w", split)], projections={"w": pull})
    split.grad = torch.zeros_like(split)
    with pytest.raises(ValueError, match="processes differ: the projection of 'w' is"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_four_processes(tmp_path):
    assert start(work, PROCESSES, tmp_path) == 0
    for rank, became in enumerate(outcomes(tmp_path, PROCESSES)):
        for name in CHECKS:
            outcome = became.get(name, "not reached")
            assert outcome == "passed", f"{name} in process {rank}: {outcome}"
