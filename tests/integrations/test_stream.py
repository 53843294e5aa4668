"""A stream of domains whose boundaries nobody announces, in HF's Trainer."""

from __future__ import annotations

import pytest
import torch
import transformers
from cases.methods import copy_of, domain, logits, same, weights
from cases.trainers import records, trainer_of

from sparse_cl.integrations import ContinualCallback
from sparse_cl.integrations.stream import Stream
from sparse_cl.methods import Elastic, load_carried
from sparse_cl.probes.boundaries import BoundaryDetector

OPTIONS = {"max_steps": 50, "train_sampling_strategy": "sequential", "learning_rate": 3e-3}


def stream():
    return records(0, 4 * 24) + records(1, 4 * 26)


def auto(method=None, **options):
    return ContinualCallback(method or Elastic(), boundaries="auto", **options)


def test_boundaries_are_found_and_what_came_before_is_protected(tiny_llama, tmp_path):
    moved = {}
    for name, callbacks in (("free", ()), ("held", [auto(name="text")])):
        model = copy_of(tiny_llama)
        trainer_of(model, stream()[: 4 * 24], tmp_path / name / "first", **{**OPTIONS, "max_steps": 24}).train()
        before = logits(model, domain(0))
        model = copy_of(tiny_llama)
        trainer_of(model, stream(), tmp_path / name, callbacks, **OPTIONS).train()
        moved[name] = float((logits(model, domain(0)) - before).norm() / before.norm())
    carried = load_carried(tmp_path / "held")
    assert carried.memory.domains == 2
    assert [entry["name"] for entry in carried.domains] == ["text-1", "text-2"]
    first, second = (entry["steps"] for entry in carried.domains)
    assert 24 <= first <= 28
    assert first + second == 50
    assert moved["held"] < 0.8 * moved["free"]


def test_each_domain_is_remembered_by_its_own_batches(tiny_llama):
    kept, detector = {}, BoundaryDetector()
    watched = Stream(tiny_llama, detector, 32)
    tiny_llama.train()
    for i in range(50):
        rows = stream()[4 * i : 4 * i + 4]
        tiny_llama(**{name: torch.tensor([row[name] for row in rows]) for name in rows[0]})
        if watched.at_boundary:
            kept["old"], kept["new"] = watched.split()
    kept["end"] = watched.present()
    watched.close()
    ranges = {
        name: {int(x) // 40 for batch in found for x in batch["input_ids"].flatten()} for name, found in kept.items()
    }
    assert ranges == {"old": {0}, "new": {1}, "end": {1}}
    assert 6 <= len(kept["old"]) <= len(kept["end"]) == 8  # of four records; what came late may have been drawn
    assert all((batch["labels"][:, :2] == -100).all() for batch in kept["old"])
    tiny_llama.eval()
    before = watched.state_dict()["seen"]
    logits(tiny_llama, domain(0))
    assert watched.state_dict()["seen"] == before


class Late(BoundaryDetector):
    """Cries at the 80th batch that the domain began 70 batches before."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def update(self, tokens, mask=None, **scores):
        self.seen, self.start = self.seen + 1, 70
        return self.seen == 80


@pytest.mark.parametrize("more", [0, 70])
def test_a_boundary_that_is_noticed_very_late_leaves_the_old_domain_a_batch(tiny_llama, more):
    watched = Stream(tiny_llama, Late(), 1)  # one batch is kept, drawn evenly: likely one of the new domain
    tiny_llama.train()
    for i in range(80 + more):  # in one step
        tiny_llama(input_ids=torch.tensor([[i]]))
    old, new = watched.split()
    watched.close()
    assert len(old) == 1 and int(old[0]["input_ids"]) <= 16
    assert int(new[-1]["input_ids"]) == 79 + more


@pytest.mark.parametrize("begun", ["from a folder", "by a method that learned all of it"])
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(tiny_llama, tmp_path, begun):
    memory = tmp_path / "earlier" if begun == "from a folder" else None
    if memory:
        trainer_of(tiny_llama, records(2), memory, [ContinualCallback(Elastic())], max_steps=4).train()
    other, options = copy_of(tiny_llama), {**OPTIONS, "save_strategy": "steps", "save_steps": 20}
    method = Elastic()
    trainer_of(tiny_llama, stream(), tmp_path / "whole", [auto(method, name="a", memory=memory)], **options).train()
    assert load_carried(tmp_path / "whole").memory.domains == (3 if memory else 2)
    for step in (20, 40):  # before the boundary, and after
        model = copy_of(other)
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        again = auto(method if "method" in begun else None, name="a", memory=memory, checkpoint=checkpoint)
        trainer = trainer_of(model, stream(), tmp_path / str(step), [again], **options)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert same(weights(model), weights(tiny_llama))
        first, second = load_carried(tmp_path / "whole"), load_carried(tmp_path / str(step))
        assert first.domains == second.domains
        for name in first.memory.names:
            assert torch.equal(first.memory.basis(name), second.memory.basis(name))


def test_an_abandoned_stream_watches_no_more(tiny_llama):
    watched = Stream(tiny_llama, BoundaryDetector(), 32)
    assert tiny_llama._forward_pre_hooks
    del watched
    assert not tiny_llama._forward_pre_hooks


def test_a_detector_begins_anew_with_each_training(tiny_llama, tmp_path):
    class Interrupts(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    callback = auto(name="a")
    callback.boundaries = BoundaryDetector()
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tiny_llama, stream(), tmp_path / "none", [callback, Interrupts()], **OPTIONS).train()
    for folder, data in (("two", stream()), ("one", records(2, 4 * 50))):
        trainer_of(tiny_llama, data, tmp_path / folder, [callback], **OPTIONS).train()
    first, second, third = (entry["steps"] for entry in load_carried(tmp_path / "one").domains)
    assert 24 <= first <= 28
    assert (first + second, third) == (50, 50)
    assert not tiny_llama._forward_pre_hooks


def test_what_is_refused(tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="boundaries: expected 'auto', a BoundaryDetector or None, got 'all'"):
        ContinualCallback(Elastic(), boundaries="all")
    before = weights(tiny_llama)
    for strategy in ("random", "group_by_length"):
        options = {**OPTIONS, "train_sampling_strategy": strategy}
        with pytest.raises(
            RuntimeError, match="boundaries: the trainer shuffles the data, so there are none to find; give"
        ):
            trainer_of(tiny_llama, stream(), tmp_path, [auto()], **options).train()
    trainer = trainer_of(tiny_llama, stream(), tmp_path, [auto()], **OPTIONS)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(RuntimeError, match="boundaries: load_best_model_at_end would bring back weights of an earlier"):
        trainer.train()
    assert same(before, weights(tiny_llama))
