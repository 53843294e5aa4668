"""Checks of methods with adapters in a loop of one's own: fully_shard splits the model once it has its adapter."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_cl.methods import ElasticLoRA, LoRA, OrthogonalLoRA
from sparse_cl.models.sharding import split, whole_weights

PROCESSES = 4


def base():
    torch.manual_seed(5)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=40, num_hidden_layers=1, max_position_embeddings=16, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).double()


def batches(domain, rank=None):
    """Of four sequences over half of the vocabulary, or one process's part of them."""
    ids = torch.randint(20 * domain, 20 * domain + 20, (3, 4, 8), generator=torch.Generator().manual_seed(domain))
    own = ids if rank is None else ids[:, rank : rank + 1]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in own]


def learned(method, model, domain, mesh=None):
    rank = None if mesh is None else dist.get_rank()
    torch.manual_seed(rank or 0)  # what one process draws, all must have
    model = method.before_domain(model, batches(domain, rank))
    if mesh is not None:
        model = split(model, mesh)
    optimizer = method.make_optimizer(model, 1e-2)
    for batch in batches(domain, rank):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    method.after_domain(model, batches(domain, rank))
    return model


def two_domains(make, folder, mesh=None):
    """The second in a run of its own, that goes on from the adapter of the first. Returns weights, and the report."""
    method = make()
    model = learned(method, base(), 0, mesh)
    if mesh is None:
        model.save_pretrained(folder)
        method.save(folder)
    else:
        tensors = whole_weights(model)
        if dist.get_rank() == 0:
            model.save_pretrained(folder, state_dict=tensors)
            method.save(folder)
        dist.barrier()
    method = make()
    model = learned(method, method.restore(base(), [folder]), 1, mesh)
    tensors = {name: p if mesh is None else p.full_tensor() for name, p in model.named_parameters()}
    return tensors, method.record().get("layers", {})


#: Two rows of A, so that two processes hold none.
MAKERS = (lambda: ElasticLoRA(rank=2, strength=2.0), lambda: OrthogonalLoRA(rank=2, max_rank=3), LoRA)


def adapters_learn_two_domains(folder):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for make in MAKERS:
        found = two_domains(make, folder / make().name, mesh)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{make().name}.pt")


def one_process_learned_the_same(folder):
    """In one process, what :func:`adapters_learn_two_domains` left."""
    own = folder / adapters_learn_two_domains.__name__
    for make in MAKERS:
        name = make().name
        many, said = torch.load(own / f"{name}.pt")
        one, expected = two_domains(make, own / f"{name}-alone")
        for key, value in one.items():
            torch.testing.assert_close(many[key], value, rtol=0, atol=1e-9, msg=lambda m, k=key: k + m)
        assert all(value.any() for key, value in one.items() if "lora_B" in key)
        for key, layer in expected.items():
            assert said[key]["leak"] == pytest.approx(layer["leak"], abs=1e-9), key
            assert name != "orthogonal-lora" or layer["leak"] <= 1e-6


def a_split_model_gets_no_adapter(folder):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    before = ElasticLoRA(rank=2)
    plain = fully_shard(base(), mesh=mesh)
    for method, model in ((before, learned(before, base(), 0, mesh)), (ElasticLoRA(), plain), (LoRA(), plain)):
        with pytest.raises(ValueError, match=r"is split over processes.* method.restore\(base, \[folder\]\)"):
            method.before_domain(model, batches(1))


CHECKS = [adapters_learn_two_domains, a_split_model_gets_no_adapter]
