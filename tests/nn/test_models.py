"""Active layers in whole models and trainers: transformers, two processes, mixed precision."""

import copy

import pytest
import torch
import torch.distributed as dist
from cases.active_mlp import active_mlp, batches, losses
from cases.forked import start_two
from torch.nn.parallel import DistributedDataParallel

from sparse_cl import SparseMaskedAdamW
from sparse_cl.models.neuron_masks import neuron_masks, places
from sparse_cl.models.parts import find_mlps
from sparse_cl.nn import ActiveLinear, activate, restore


def two_steps(model, inputs):
    optimizer = SparseMaskedAdamW(model.named_parameters(), lr=0.02)
    for batch in inputs:
        losses(model, [batch])
        optimizer.step()
        optimizer.zero_grad()


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = active_mlp()
    if rank:
        # What the processes begin with differs; the first one's counts, leaf and weight alike.
        with torch.no_grad():
            model[0].weight.mul_(2)
            model[0].refresh()
    wrapped = DistributedDataParallel(model)
    two_steps(wrapped, [batch[rank : rank + 1] for batch in batches()])
    torch.save({"parameters": dict(model.named_parameters()), "state": model.state_dict()}, f"{folder}/{rank}")
    restore(model)
    assert not any(isinstance(module, ActiveLinear) for module in wrapped.modules())
    # Freed after its group, DDP waits in its destructor for a thread that waits for the interpreter.
    del wrapped
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_agree_with_one(tmp_path):
    start_two(work, tmp_path)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    alone = active_mlp()
    two_steps(alone, [batch[:2] for batch in batches()])
    for name, value in alone.named_parameters():
        assert torch.equal(first["parameters"][name], second["parameters"][name]), name
        assert torch.allclose(first["parameters"][name], value, rtol=1e-6, atol=1e-6), name
    assert first["state"].keys() == alone.state_dict().keys()


def some_neurons(model):
    masks = {}
    for mlp in find_mlps(model):
        masks |= neuron_masks(places(mlp), torch.tensor([1, 5, 20]))
    return masks


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_language_model_with_checkpointing_and_autocast(tiny_llama, reentrant):
    ids = torch.arange(24).view(2, 12)
    dense = copy.deepcopy(tiny_llama).train()
    masks = some_neurons(tiny_llama)
    activate(tiny_llama, masks)
    tiny_llama.enable_input_require_grads()
    tiny_llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (tiny_llama.train(), dense):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    for name, mask in masks.items():
        layer = tiny_llama.get_submodule(name.removesuffix(".weight"))
        whole = dense.get_parameter(name).grad
        expected = whole[mask.to_dense()].view_as(layer.active.grad)
        assert layer.weight.grad is None
        assert (layer.active.grad - expected).norm() <= 2e-2 * expected.norm()


def test_saved_models_are_ordinary(tiny_llama, tmp_path):
    masks = some_neurons(tiny_llama)
    ids = torch.arange(24).view(2, 12)
    activate(tiny_llama, masks)
    optimizer = SparseMaskedAdamW(tiny_llama.named_parameters(), lr=1e-2)
    tiny_llama(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    tiny_llama.save_pretrained(tmp_path)
    loaded = type(tiny_llama).from_pretrained(tmp_path)
    restore(tiny_llama)
    assert loaded.state_dict().keys() == tiny_llama.state_dict().keys()
    for name, value in tiny_llama.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert tiny_llama.lm_head.weight is tiny_llama.model.embed_tokens.weight


def test_scaled_gradients_and_steps_that_are_skipped():
    """torch.amp.GradScaler, whose scale and verdict the optimizer takes into its kernel."""
    scaled, plain = active_mlp(), active_mlp()
    optimizers = [SparseMaskedAdamW(model.named_parameters(), lr=0.02) for model in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    first, second = batches()
    scaler.scale(scaled(first).square().mean()).backward()
    scaler.step(optimizers[0])
    scaler.update()
    plain(first).square().mean().backward()
    optimizers[1].step()
    for name, value in plain.named_parameters():
        assert torch.allclose(value, scaled.get_parameter(name), rtol=1e-5, atol=1e-6), name

    before = {name: value.clone() for name, value in scaled.named_parameters()}
    optimizers[0].zero_grad()
    scaler.scale(scaled(second * float("inf")).square().mean()).backward()
    scaler.step(optimizers[0])
    for name, value in scaled.named_parameters():
        assert torch.equal(value, before[name]), name
