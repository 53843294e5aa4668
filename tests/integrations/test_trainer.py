"""The callback in HF's Trainer: what it protects, that it goes on with the same bits, and what it refuses."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from cases.methods import copy_of, domain, logits, same, weights
from cases.trainers import records, trainer_of

from sparse_cl import ElasticAdamW, RowMask, SparseMaskedAdamW, storage
from sparse_cl.integrations import ActiveClipping, ContinualCallback
from sparse_cl.integrations.domain import STATE
from sparse_cl.methods import Curvature, Elastic, ElasticLoRA, Orthogonal, load_carried


def two_domains(model, tmp_path, make, **options):
    """How far outputs on the first domain move while the second is learned; and the second trainer."""
    trainer_of(model, records(0), tmp_path / "0", [make()] if make else (), **options).train()
    model.save_pretrained(tmp_path / "0")
    before = logits(model, domain(0))
    callbacks = [make(memory=tmp_path / "0")] if make else ()
    trainer = trainer_of(model, records(1), tmp_path / "1", callbacks, max_steps=12, **options)
    trainer.train()
    return float((logits(model, domain(0)) - before).norm() / before.norm()), trainer


def elastic(**options):
    return ContinualCallback(Elastic(), **options)


def test_the_second_domain_moves_old_outputs_less_than_without(tiny_llama, tmp_path):
    free, _ = two_domains(copy_of(tiny_llama), tmp_path / "a", None)
    held, trainer = two_domains(copy_of(tiny_llama), tmp_path / "b", elastic)
    assert held < 0.6 * free
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["old_output_drift"] <= entry["old_output_drift_most"] for entry in logged)
    carried = load_carried(tmp_path / "b" / "1")
    assert carried.memory.domains == 2
    assert [entry["name"] for entry in carried.domains] == ["0", "1"]
    assert carried.domains[1]["steps"] == 12 and carried.domains[1]["method"] == "elastic"


@pytest.mark.parametrize("between", [lambda method: method, copy.deepcopy], ids=["itself", "a copy"])
def test_a_method_that_is_used_again_keeps_the_history(tiny_llama, tmp_path, between):
    method = Elastic()
    for number in range(2):
        trainer_of(tiny_llama, records(number), tmp_path / str(number), [ContinualCallback(method)]).train()
        method = between(method)
    assert [entry["name"] for entry in load_carried(tmp_path / "1").domains] == ["0", "1"]


def test_an_optimizer_that_is_put_in_the_place_of_the_protected_one_is_noticed(tiny_llama, tmp_path):
    method = Elastic()
    trainer_of(tiny_llama, records(0), tmp_path / "0", [ContinualCallback(method)]).train()
    trainer = trainer_of(tiny_llama, records(1), tmp_path / "1", [ContinualCallback(method)])

    class Replaces(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.optimizer = trainer.accelerator.prepare(torch.optim.AdamW(tiny_llama.parameters()))

    trainer.add_callback(Replaces())
    with pytest.raises(RuntimeError, match="nothing would be protected"):
        trainer.train()


def test_an_orthogonal_method_keeps_out_behind_any_optimizer(tiny_llama, tmp_path):
    make = lambda **options: ContinualCallback(Orthogonal(energy=0.999), **options)  # noqa: E731
    held, _ = two_domains(copy_of(tiny_llama), tmp_path, make, weight_decay=0.0)
    free, _ = two_domains(copy_of(tiny_llama), tmp_path / "free", None)
    assert held < 0.5 * free


def test_looking_leaves_the_order_and_the_random_numbers_of_training(tiny_llama, tmp_path):
    ends = []
    for name, callbacks in (("a", ()), ("b", [elastic()])):
        model = copy_of(tiny_llama)
        transformers.set_seed(0)
        trainer_of(model, records(0), tmp_path / name, callbacks).train()
        ends.append(weights(model))
    assert same(*ends), "in a first domain there is nothing to protect"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_domain_that_is_resumed_in_its_middle_ends_with_the_same_bits(tiny_llama, tmp_path, dtype):
    model = tiny_llama.to(dtype)
    trainer_of(model, records(0), tmp_path / "0", [elastic()]).train()
    ends = []
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}
    model.save_pretrained(tmp_path / "0")
    for resumes in (False, True):
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "0", dtype=dtype)
        trainer = trainer_of(again, records(1), tmp_path / "1", [elastic(memory=tmp_path / "0")], **saving)
        trainer.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3") if resumes else None)
        carried = load_carried(tmp_path / "1", again)
        ends.append((weights(again), {name: carried.memory.basis(name) for name in carried.memory.names}))
    assert same(ends[0][0], ends[1][0]) and same(ends[0][1], ends[1][1])


def test_a_checkpoint_alone_is_enough_to_go_on(tiny_llama, tmp_path):
    method = Elastic()
    trainer_of(tiny_llama, records(0), tmp_path / "0", [ContinualCallback(method)]).train()
    start, ends = copy_of(tiny_llama), []
    for number, callback in enumerate((ContinualCallback(method), elastic())):
        model = copy_of(start)
        if number == 0:
            model = tiny_llama
        saving = {"save_strategy": "steps", "save_steps": 3}
        trainer = trainer_of(model, records(1), tmp_path / "1", [callback], **saving)
        trainer.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3") if number else None)
        ends.append(weights(model))
    assert same(*ends)


def test_a_checkpoint_without_the_protection_is_refused(tiny_llama, tmp_path):
    trainer_of(tiny_llama, records(0), tmp_path, save_strategy="steps", save_steps=3).train()
    trainer = trainer_of(tiny_llama, records(0), tmp_path, [elastic()])
    with pytest.raises(RuntimeError, match="goes on at step 3, but there is no sparse_cl/protection.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_in_a_domain_is_no_memory_of_it(tiny_llama, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6}
    trainer_of(tiny_llama, records(0), tmp_path / "0", [elastic()], **saving).train()
    later = trainer_of(tiny_llama, records(1), tmp_path / "1", [elastic(memory=tmp_path / "0" / "checkpoint-6")])
    with pytest.raises(ValueError, match="is a checkpoint in the middle of a domain, .*give the output folder"):
        later.train()


def test_training_that_was_interrupted_begins_again(tiny_llama, tmp_path):
    class Interrupts(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    method, interrupts = Elastic(), Interrupts()
    trainer_of(tiny_llama, records(0), tmp_path / "0", [ContinualCallback(method)]).train()
    trainer = trainer_of(tiny_llama, records(1), tmp_path / "1", [ContinualCallback(method), interrupts])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupts)
    trainer.train()
    assert method.memory.domains == 2


def test_training_that_began_from_a_folder_begins_again(tiny_llama, tmp_path):
    trainer_of(tiny_llama, records(0), tmp_path / "0", [elastic()]).train()
    callback = elastic(memory=tmp_path / "0")
    trainer = trainer_of(tiny_llama, records(1), tmp_path / "1", [callback])
    trainer.train()
    trainer.train()
    assert callback.method.memory.domains == 3
    assert [entry["name"] for entry in load_carried(tmp_path / "1").domains] == ["0", "1", "1"]


def test_a_checkpoint_goes_on_with_its_own_memory(tiny_llama, tmp_path):
    """Where all ranks are at their cap, W U of other directions has the same shape."""
    make = lambda: Elastic(energy=1.0, max_rank=4, row_strength=0.0)  # noqa: E731
    method, start = make(), copy_of(tiny_llama)
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(tiny_llama, records(0), tmp_path / "0", [ContinualCallback(method)]).train()
    trainer_of(tiny_llama, records(1), tmp_path / "1", [ContinualCallback(method)], **saving).train()
    expected = weights(tiny_llama)
    checkpoint = str(tmp_path / "1" / "checkpoint-3")
    for callback in (ContinualCallback(method), ContinualCallback(make(), memory=tmp_path / "1")):
        model = copy_of(start)
        trainer_of(model, records(1), tmp_path / "1", [callback]).train(resume_from_checkpoint=checkpoint)
        assert same(weights(model), expected)
        assert callback.method.memory.domains == 2


def test_a_protection_that_cannot_go_on_is_taken_away(tiny_llama, tmp_path):
    method, saving = Elastic(), {"save_strategy": "steps", "save_steps": 3}
    trainer_of(tiny_llama, records(0), tmp_path / "0", [ContinualCallback(method)]).train()
    trainer = trainer_of(tiny_llama, records(1), tmp_path / "1", [ContinualCallback(method)], **saving)
    trainer.train()
    broken = storage.read(tmp_path / "1" / "checkpoint-3" / STATE, "protection", "it", "steps", "paths")
    tensors = {name: tensor[..., :1].clone() if tensor.dim() else tensor for name, tensor in broken[0].items()}
    storage.write(tmp_path / "1" / "checkpoint-3" / STATE, "protection", tensors, steps=3, paths=broken[1]["paths"])
    with pytest.raises(ValueError, match="expected origin_rows of shape"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3"))
    trainer.train()


def test_training_without_a_step_is_not_remembered(tiny_llama, tmp_path):
    method = Elastic()
    trainer = trainer_of(
        tiny_llama, records(0), tmp_path, [ContinualCallback(method)], max_steps=-1, num_train_epochs=0
    )
    with pytest.warns(UserWarning, match="training ended without a step"):
        trainer.train()
    assert load_carried(tmp_path) is None and not method.memory.domains


def test_an_adapter_of_the_users(tiny_llama, tmp_path):
    def wrapped():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(copy_of(tiny_llama), config)

    free, _ = two_domains(wrapped(), tmp_path / "a", None)
    held, trainer = two_domains(wrapped(), tmp_path / "b", elastic)
    assert held < 0.8 * free
    assert len(load_carried(tmp_path / "b" / "1").memory.names) == 28


def test_our_own_optimizer_takes_the_memory(tiny_llama, tmp_path):
    """By `optimizer_cls_and_kwargs`, resumed in the middle."""
    trainer_of(tiny_llama, records(0), tmp_path / "0", [elastic()]).train()
    tiny_llama.save_pretrained(tmp_path / "0")
    saving, ends = {"save_strategy": "steps", "save_steps": 3}, []
    for resumes in (False, True):
        model = copy_of(tiny_llama)
        trainer = trainer_of(model, records(1), tmp_path / "1", [elastic(memory=tmp_path / "0")], **saving)
        trainer.optimizer_cls_and_kwargs = (ElasticAdamW, {"lr": 1e-2})
        trainer.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-3") if resumes else None)
        ends.append(weights(model))
        assert trainer.optimizer.optimizer.memory.domains == 2
        assert trainer.state.log_history[-2]["old_output_drift"] > 0
    assert same(*ends)


class Elsewhere(transformers.Trainer):
    """As ZeRO and FSDP1: what is stepped are copies of the parameters."""

    swap = "before"

    def create_optimizer(self, model=None):
        super().create_optimizer(model)
        if self.swap == "before":
            self.swapped()
        return self.optimizer

    def swapped(self):
        for group in self.optimizer.param_groups:
            group["params"] = [torch.nn.Parameter(p.detach().flatten().clone()) for p in group["params"]]

    def training_step(self, *args, **kwargs):
        if self.swap == "later":
            self.swapped()
        elif self.swap == "another":
            self.optimizer.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("swap", ["before", "later", "another"])
def test_a_protection_that_would_be_lost_is_an_error(tiny_llama, tmp_path, swap):
    trainer_of(tiny_llama, records(0), tmp_path / "0", [elastic()]).train()
    trainer = trainer_of(tiny_llama, records(1), tmp_path / "1", [elastic(memory=tmp_path / "0")], kind=Elsewhere)
    trainer.swap = swap
    words = "is not the AdamW behind which" if swap == "another" else "the optimizer steps other tensors than the mod"
    with pytest.raises(RuntimeError, match=words):
        trainer.train()


@pytest.mark.parametrize("method", [ElasticLoRA, Curvature])
def test_methods_that_need_their_own_optimizer_or_model_are_refused(tiny_llama, tmp_path, method):
    words = "elastic-lora wraps the model" if method is ElasticLoRA else "curvature needs an optimizer of its own"
    trainer = trainer_of(tiny_llama, records(0), tmp_path, [ContinualCallback(method())])
    with pytest.raises(ValueError, match=words):
        trainer.train()


def test_a_folder_that_carries_nothing(tiny_llama, tmp_path):
    trainer = trainer_of(tiny_llama, records(0), tmp_path / "1", [elastic(memory=tmp_path)])
    with pytest.raises(ValueError, match="memory: .* carries none"):
        trainer.train()
    with pytest.raises(TypeError, match="method: expected a method such as Elastic"):
        ContinualCallback(Elastic)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_clipping_counts_active_entries_alone(tiny_llama, tmp_path, by_name, accumulated):
    model, seen = tiny_llama, []
    masks = {n: RowMask(range(0, p.shape[0], 20), p.shape) for n, p in model.named_parameters() if "_proj" in n}
    for name, p in model.named_parameters():
        p.requires_grad_(name in masks)
    optimizer = None if by_name else SparseMaskedAdamW(model.named_parameters(), lr=1e-4, masks=masks)
    options = {"max_grad_norm": 1e-3, "max_steps": 1, "gradient_accumulation_steps": accumulated}
    trainer = trainer_of(model, records(0), tmp_path, [ActiveClipping()], optimizers=(optimizer, None), **options)
    before = weights(model)
    if by_name:
        trainer.optimizer_cls_and_kwargs = (
            SparseMaskedAdamW,
            {"params": list(model.named_parameters()), "lr": 1e-4, "masks": masks},
        )

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            active = [p.grad[::20] for p in model.parameters() if p.grad is not None]
            seen.append(float(torch.stack([part.norm() for part in active]).norm()))

    trainer.add_callback(Look())
    trainer.train()
    assert seen == pytest.approx([1e-3], rel=1e-3)
    for name, p in model.named_parameters():
        moved = (p != before[name]).flatten(1).any(1).nonzero().flatten().tolist() if name in masks else []
        assert set(moved) <= set(range(0, p.shape[0], 20)) and bool(moved) == (name in masks)
