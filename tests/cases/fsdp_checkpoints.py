"""Checks of SparseMaskedAdamW: checkpoints of some processes go on in others, bit for bit."""

from __future__ import annotations

import os
import pickle
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.optim import AdamW

from sparse_cl import RowMask, SparseMaskedAdamW

from .fsdp_steps import Twins, build, kinds_for, local, masks_of, meshes, split
from .optimizers import as_bytes

OPTIONS = {"dtype": torch.bfloat16, "second_moment": "row"}

#: Parameters of which nothing is active have no state, which torch refuses otherwise.
NOT_STRICT = StateDictOptions(strict=False)


def state_of(model, optimizer):
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def processes(group):
    return {"no_dist": True} if group == "none" else {"process_group": group}


def save(model, optimizer, folder, group=None, later=False):
    if later:
        dcp.async_save(state_of(model, optimizer), checkpoint_id=folder).result()
        return
    dcp.save(state_of(model, optimizer), checkpoint_id=folder, **processes(group))


def load(model, optimizer, folder, group=None):
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder, **processes(group))
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=NOT_STRICT)


def with_history(mesh, placements, kinds=None, **options):
    twins = Twins(mesh, placements, kinds_for(placements) if kinds is None else kinds, **options)
    twins.step()
    twins.set_masks(seed=3)
    twins.step()
    twins.set_masks(seed=4)
    twins.step()
    return twins


def a_checkpoint_goes_on_in_4_2_1_and_4_processes(folder):
    mesh, two = init_device_mesh("cpu", (4,)), DeviceMesh("cpu", [0, 1])
    twins = with_history(mesh, [Shard(0)], **OPTIONS)
    save(twins.models[1], twins.optimizers[1], folder / "4")
    # Each goes on for one step, which the twin in one process takes as well.
    for place, name, before in (((two, [Shard(0)]), "2", "4"), ((None, None), "1", "2")):
        twins.backward()
        twins.optimizers[0].step()
        if dist.get_rank() < int(name):
            group = "none" if name == "1" else two.get_group()
            model, optimizer = build(*place, twins.kinds, masks_of(twins.kinds, 4), **OPTIONS)
            load(model, optimizer, folder / before, group)
            for key, param in twins.models[0].items():
                model[key].grad = split(param.grad, *place)
            optimizer.step()
            save(model, optimizer, folder / name, group)
        dist.barrier()
    twins.models[1], twins.optimizers[1] = build(mesh, [Shard(0)], twins.kinds, masks_of(twins.kinds, 4), **OPTIONS)
    load(twins.models[1], twins.optimizers[1], folder / "1")
    twins.assert_equal()
    twins.step()
    twins.assert_equal()


def other_meshes_read_it_too(folder):
    for before, after in (("hsdp", "rows"), ("columns", "rows and columns")):
        saving, loading = meshes()[before], meshes()[after]
        kinds = [kind for kind in kinds_for(saving[1]) if kind in kinds_for(loading[1])]
        twins = with_history(*saving, kinds, amsgrad=True)
        save(twins.models[1], twins.optimizers[1], folder / before, later=before == "hsdp")
        again = Twins(*loading, kinds, amsgrad=True)
        again.set_masks(seed=4)
        load(again.models[1], again.optimizers[1], folder / before)
        again.models[0].load_state_dict(twins.models[0].state_dict())
        again.optimizers[0].load_state_dict(twins.optimizers[0].state_dict())
        again.assert_equal()
        again.step(2)
        again.assert_equal()


def counts_and_indices_are_those_of_one_process(folder):
    for name in ("hsdp", "rows and columns"):
        twins = with_history(*meshes()[name])
        one, many = (optimizer.state_dict()["state"] for optimizer in twins.optimizers)
        assert one.keys() == many.keys()
        assert len({entries["counts"] for entries in one.values()}) > 2
        for number, entries in one.items():
            assert entries.keys() == many[number].keys()
            for name, value in entries.items():
                other = many[number][name]
                if name in ("step", "rows", "columns", "bits", "ranks", "gain", "two_four_bits"):
                    assert torch.equal(value, other), name
                elif name == "counts":
                    assert value == other
                else:
                    assert value.shape == other.shape and value.dtype == other.dtype


def a_state_dict_of_one_process_loads_as_it_is(folder):
    for name in ("rows", "columns"):
        twins = with_history(*meshes()[name])
        for way in (dict, lambda state: pickle.loads(pickle.dumps(state))):
            twins.optimizers[1].load_state_dict(way(twins.optimizers[0].state_dict()))
            twins.step()
            twins.assert_equal()


def a_full_state_dict_of_one_process_is_distributed(folder):
    for broadcast in (False, True):
        twins = with_history(init_device_mesh("cpu", (4,)), [Shard(0)], ["rows", "elements"])
        state = get_optimizer_state_dict(twins.models[0], twins.optimizers[0])
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast, strict=False)
        state = state if dist.get_rank() == 0 or not broadcast else {}
        set_optimizer_state_dict(twins.models[1], twins.optimizers[1], state, options=options)
        twins.step()
        twins.assert_equal()


def adamw_is_taken_over(folder):
    mesh = init_device_mesh("cpu", (4,))
    twins = Twins(mesh, [Shard(0)], ["dense"])
    twins.optimizers = [AdamW(model.parameters(), foreach=False) for model in twins.models]
    twins.step(2)
    ours = [SparseMaskedAdamW(model.named_parameters()) for model in twins.models]
    for optimizer, old in zip(ours, twins.optimizers, strict=True):
        optimizer.load_state_dict(old.state_dict())
    twins.optimizers = ours
    twins.step()
    twins.assert_equal()


def other_masks_are_refused_everywhere_until_set_masks(folder):
    mesh = init_device_mesh("cpu", (4,))
    twins = with_history(mesh, [Shard(0)])
    # They differ in a row that process 0 alone holds.
    now = masks_of(twins.kinds, 4)
    rows = set(now["rows_uneven"].index.tolist()) ^ {0}
    now["rows_uneven"] = RowMask(sorted(rows), now["rows_uneven"].shape)
    twins.models[1], twins.optimizers[1] = build(mesh, [Shard(0)], twins.kinds, now)
    twins.models[1].load_state_dict(
        {name: split(param.detach(), mesh, [Shard(0)]) for name, param in twins.models[0].items()}
    )
    twins.optimizers[1].load_state_dict(twins.optimizers[0].state_dict())
    twins.backward()
    with pytest.raises(ValueError, match="'rows_uneven': its loaded state was made under RowMask.*call set_masks"):
        twins.optimizers[1].step()
    for optimizer in twins.optimizers:
        optimizer.set_masks(now)
    twins.step(2)
    twins.assert_equal()


def a_part_does_not_pass_for_the_whole(folder):
    mesh = init_device_mesh("cpu", (2, 2))
    twins = Twins(mesh, [Replicate(), Shard(0)], ["rows"])
    twins.step()
    model, optimizer = twins.models[1], twins.optimizers[1]
    full = StateDictOptions(full_state_dict=True)
    for state in (optimizer.state_dict(), get_optimizer_state_dict(model, optimizer, options=full)):
        with pytest.raises(TypeError, match="through torch.distributed.checkpoint only"):
            torch.save(state, folder / f"{dist.get_rank()}.pt")
    options = StateDictOptions(cpu_offload=True, strict=False)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(model, optimizer, state, options=options)
    twins.step()
    twins.assert_equal()


def save_whole_and_torn(folder):
    """Writes a checkpoint, `whole`, and is killed in process 3 while it writes the next."""

    class Killed(dcp.FileSystemWriter):
        def write_data(self, *arguments, **options):
            if dist.get_rank() == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write_data(*arguments, **options)

    twins = with_history(init_device_mesh("cpu", (4,)), [Shard(0)])
    save(twins.models[1], twins.optimizers[1], folder / "whole")
    twins.step()
    dcp.save(state_of(twins.models[1], twins.optimizers[1]), storage_writer=Killed(folder / "torn"))


def reads_whole_and_torn(folder):
    """In one process: what was saved last is torn, and what was saved before it goes on."""
    twins = with_history(None, [])
    model, optimizer = build(None, [], twins.kinds, masks_of(twins.kinds, 4))
    with pytest.raises(dcp.api.CheckpointException, match="metadata"):
        load(model, optimizer, folder / "torn", "none")
    load(model, optimizer, folder / "whole", "none")
    for key, param in twins.models[0].items():
        assert torch.equal(as_bytes(local(model[key])), as_bytes(param))
    twins.backward()
    for key, param in twins.models[0].items():
        model[key].grad = param.grad.clone()
    optimizer.step()
    twins.optimizers[0].step()
    assert all(torch.equal(model[key], param) for key, param in twins.models[0].items())


CHECKS = [
    a_checkpoint_goes_on_in_4_2_1_and_4_processes,
    other_meshes_read_it_too,
    counts_and_indices_are_those_of_one_process,
    a_state_dict_of_one_process_loads_as_it_is,
    a_full_state_dict_of_one_process_is_distributed,
    adamw_is_taken_over,
    other_masks_are_refused_everywhere_until_set_masks,
    a_part_does_not_pass_for_the_whole,
]
