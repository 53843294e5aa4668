"""A boundary that is noticed late: training goes back to the state before it."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from cases.active_mlp import active_mlp
from cases.methods import copy_of, same, weights
from cases.trainers import records, trainer_of
from torch import nn

from sparse_cl import ElasticAdamW, RowMask, SparseMaskedAdamW
from sparse_cl.integrations import ContinualCallback
from sparse_cl.integrations.rewind import Rewind
from sparse_cl.methods import Elastic, load_carried
from sparse_cl.probes.boundaries import BoundaryDetector

OPTIONS = {"train_sampling_strategy": "sequential", "learning_rate": 3e-3, "lr_scheduler_type": "constant"}


def plain(optimizer):
    return getattr(optimizer, "optimizer", optimizer)


def tensors_of(value, name=""):
    """Each tensor and number of a state dict, by its path; copies."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    else:
        return {name: torch.as_tensor(value).detach().cpu().clone()} if isinstance(value, float | torch.Tensor) else {}
    return {key: found for at, part in parts for key, found in tensors_of(part, f"{name}.{at}").items()}


class States(transformers.TrainerCallback):
    """Weights and optimizer's state at each step's end, before a callback that comes later, and after the last one."""

    def __init__(self, into):
        self.into = into

    def on_step_end(self, args, state, control, **kwargs):
        found = weights(kwargs["model"]) | tensors_of(plain(kwargs["optimizer"]).state_dict()["state"])
        self.into[state.global_step] = {name: part for name, part in found.items() if ".projection" not in name}


class Cries(BoundaryDetector):
    """Warns of a batch and cries at a later one, whatever they are."""

    def __init__(self, warns, cries):
        super().__init__()
        self.at, self.seen = (warns, cries), 0

    @property
    def warns(self):
        return self.at[0] <= self.seen - 1 < self.at[1]

    def update(self, tokens, mask=None, **scores):
        self.seen += 1
        return self.seen - 1 == self.at[1]


@pytest.mark.parametrize(("kind", "accumulated"), [(torch.optim.AdamW, 1), (ElasticAdamW, 2)])
def test_after_an_alarm_weights_and_moments_are_those_before_the_boundary(tiny_llama, tmp_path, kind, accumulated):
    before, after = {}, {}
    callback = ContinualCallback(Elastic(), boundaries="auto", name="d")
    options = {**OPTIONS, "gradient_accumulation_steps": accumulated, "max_steps": 24 // accumulated}
    data = records(0, 4 * 17) + records(1, 4 * 7)  # of two batches a step, one of each is in the ninth
    trainer = trainer_of(tiny_llama, data, tmp_path, [States(before), callback, States(after)], **options)
    trainer.optimizer_cls_and_kwargs = (kind, {"lr": 3e-3})
    trainer.train()
    back = [step for step in before if not same(before[step], after[step])]
    assert len(back) == 1
    boundary = 17 // accumulated
    assert boundary < back[0] <= boundary + 3
    assert same(after[back[0]], before[boundary])
    assert [entry["steps"] for entry in load_carried(tmp_path).domains] == [boundary, 24 // accumulated - boundary]


def test_a_false_alarm_costs_the_steps_since_its_warning_and_nothing_else(tiny_llama, tmp_path):
    other, data = copy_of(tiny_llama), records(0, 4 * 9)
    callback = ContinualCallback(Elastic(strength=0, row_strength=0), boundaries=Cries(3, 5))
    trainer_of(tiny_llama, data, tmp_path / "false", [callback], **OPTIONS, max_steps=9).train()
    without = data[: 4 * 3] + data[4 * 6 :]
    trainer_of(other, without, tmp_path / "without", **OPTIONS, max_steps=6).train()
    assert same(weights(tiny_llama), weights(other))
    assert load_carried(tmp_path / "false").memory.domains == 2


def test_a_warning_that_comes_to_nothing_changes_nothing(tiny_llama, tmp_path):
    other, data = copy_of(tiny_llama), records(0, 4 * 6)
    callback = ContinualCallback(Elastic(), boundaries=Cries(3, 99))
    trainer_of(tiny_llama, data, tmp_path / "warned", [callback], **OPTIONS, max_steps=6).train()
    trainer_of(other, data, tmp_path / "not", **OPTIONS, max_steps=6).train()
    assert same(weights(tiny_llama), weights(other))


def test_a_checkpoint_between_warning_and_alarm_holds_the_way_back(tiny_llama, tmp_path):
    other, ends = copy_of(tiny_llama), []
    saving = {**OPTIONS, "max_steps": 22, "save_strategy": "steps", "save_steps": 19}
    data = records(0, 4 * 18) + records(1, 4 * 4)
    for model, resumes in ((tiny_llama, None), (other, str(tmp_path / "checkpoint-19"))):
        callback = ContinualCallback(Elastic(), boundaries="auto", name="d")
        trainer_of(model, data, tmp_path, [callback], **saving).train(resume_from_checkpoint=resumes)
        ends.append((weights(model), load_carried(tmp_path).domains))
    kept = torch.load(tmp_path / "checkpoint-19" / "sparse_cl" / "stream.pt", weights_only=True)["stream"]
    assert kept["rewind"]["step"] == 18
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_an_alarm_in_the_first_step_does_not_undo_all_that_was_learned(tiny_llama, tmp_path):
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    options = {**OPTIONS, "max_steps": 2, "gradient_accumulation_steps": 5}
    trainer_of(
        model, records(0, 4 * 10), tmp_path, [ContinualCallback(Elastic(), boundaries=Cries(2, 4))], **options
    ).train()
    assert [entry["steps"] for entry in load_carried(tmp_path).domains] == [1, 1]
    assert all(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)


def test_it_may_be_left_out(tiny_llama, tmp_path):
    callback = ContinualCallback(Elastic(), boundaries=Cries(3, 4), rewind=False)
    trainer_of(tiny_llama, records(0, 4 * 6), tmp_path, [callback], **OPTIONS, max_steps=6).train()
    assert [entry["steps"] for entry in load_carried(tmp_path).domains] == [5, 1]


def linear(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).to(dtype)


def masked(model):
    mask = RowMask([0, 3], model[0].weight.shape)
    return SparseMaskedAdamW(model.named_parameters(), lr=1e-2, masks={"0.weight": mask})


CASES = {
    "momentum": (lambda: linear(torch.float32), lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9)),
    "masters": (lambda: linear(torch.bfloat16), lambda m: ElasticAdamW(m.named_parameters(), lr=1e-2)),
    "masks": (lambda: linear(torch.float32), masked),
    "leaves": (lambda: active_mlp(torch.float32), lambda m: SparseMaskedAdamW(m.parameters(), lr=1e-2)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [0, 3])
def test_the_way_is_taken_again_with_the_same_bits(name, steps):
    make, optimize = CASES[name]
    model = make()
    optimizer = optimize(model)
    width, dtype = next(m.in_features for m in model.modules() if hasattr(m, "in_features")), model[-1].weight.dtype

    def step(seed):
        x = torch.randn(6, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state():
        return copy.deepcopy(model.state_dict()) | tensors_of(optimizer.state_dict()["state"])

    for seed in range(steps):
        step(seed)
    rewind, start = Rewind(optimizer), state()
    rewind.take(steps)
    for seed in range(10, 13):
        step(seed)
    end = state()
    optimizer.param_groups[0]["lr"] = 2e-2
    assert rewind.go_back() == steps
    assert same(state(), start)
    assert rewind.step is None
    assert optimizer.param_groups[0]["lr"] == 2e-2, "the schedule goes on"
    optimizer.param_groups[0]["lr"] = 1e-2
    for seed in range(10, 13):
        step(seed)
    assert same(state(), end)
