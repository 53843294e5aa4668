"""Steps to fit a probing task: by hand, of a model that cannot learn, and of the same model twice."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from sparse_cl.probes.plasticity import Fit, Plasticity, RandomSequences, plasticity, steps_to_fit

SMALL = {"lr": 1e-2, "max_steps": 30, "fixed_steps": 5}


def small_task(model):
    return RandomSequences(model.config.vocab_size, sequences=4, prompt_length=3, response_length=2)


def test_a_task_is_random_responses_to_random_prompts():
    task = RandomSequences(50, sequences=40, prompt_length=6, response_length=5)
    batch, again, other = task(0), task(0), task(1)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    assert (batch["labels"][:, :6] == -100).all()
    assert torch.equal(batch["labels"][:, 6:], batch["input_ids"][:, 6:])
    assert batch["attention_mask"].all()
    # 440 draws from 50 ids: every one of them occurs, but for 50 (1 - 1/50)^440 = 0.007 expected.
    assert batch["input_ids"].unique().tolist() == list(range(50))


def by_hand(model, batch, lr, steps):
    """Losses before each step and after the last, with nothing of the package."""
    learner = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=lr, weight_decay=0)
    losses = []
    for _ in range(steps + 1):
        output = learner(**batch)
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return losses


def test_the_losses_are_those_of_adamw_and_the_steps_are_the_first_below_the_target(tiny_llama):
    task = small_task(tiny_llama)
    expected = by_hand(tiny_llama, task(3), 1e-2, 30)
    target = (expected[11] + expected[12]) / 2
    assert min(expected[:12]) > target
    result = steps_to_fit(tiny_llama, seeds=[3], task=task, target=target, **SMALL)
    (fit,) = result.fits
    assert fit.steps == 12
    assert fit.losses == pytest.approx(expected[:13], rel=1e-4)
    assert fit.loss_after == pytest.approx(expected[5], rel=1e-4)
    early = steps_to_fit(tiny_llama, seeds=[3], task=task, target=expected[0] + 1, **SMALL).fits[0]
    assert early.steps == 0, "known before the first step"
    assert len(early.losses) == 6, "goes on to the fixed number of steps"


def test_the_model_is_as_it_was(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.layers[0].requires_grad_(False)
    kept = copy.deepcopy(tiny_llama.state_dict())
    steps_to_fit(tiny_llama, seeds=[0], task=small_task(tiny_llama), **SMALL)
    assert all(torch.equal(value, kept[name]) for name, value in tiny_llama.state_dict().items())
    assert tiny_llama.training
    assert not any(p.requires_grad for p in tiny_llama.model.layers[0].parameters())
    assert all(p.grad is None for p in tiny_llama.parameters())


def test_a_frozen_checkpoint_learns_as_a_free_one_and_does_so_under_no_grad(tiny_llama):
    task = small_task(tiny_llama)
    free = steps_to_fit(tiny_llama, seeds=[0], task=task, **SMALL)
    with torch.no_grad():
        assert steps_to_fit(tiny_llama.requires_grad_(False), seeds=[0], task=task, **SMALL) == free


def test_what_has_lost_its_plasticity_needs_more_steps_or_never_arrives(tiny_llama):
    task = small_task(tiny_llama)
    dead = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        # No hidden state reaches the head: all that is left to learn is nothing.
        dead.model.norm.weight.zero_()
        for layer in dead.model.layers:
            layer.input_layernorm.weight.zero_()
            layer.post_attention_layernorm.weight.zero_()
            for p in (layer.self_attn.o_proj, layer.mlp.down_proj):
                p.weight.zero_()
        dead.model.embed_tokens.weight.zero_()
    change = plasticity(tiny_llama, dead, seeds=[0, 1], task=task, target=1.0, lr=1e-2, max_steps=40, fixed_steps=10)
    assert all(fit.steps is not None for fit in change.before.fits)
    assert [fit.steps for fit in change.after.fits] == [None, None]
    assert change.extra_steps == (None, None)
    assert change.after.median_steps is None
    assert change.after.range_steps == (None, None)
    assert change.after.median_loss > change.before.median_loss
    json.dumps(change.to_json(), allow_nan=False)


def test_the_same_checkpoint_twice_gives_the_same_numbers(tiny_llama):
    task = small_task(tiny_llama)
    ticks = []
    change = plasticity(
        tiny_llama,
        copy.deepcopy(tiny_llama),
        seeds=[4, 5],
        task=task,
        target=2.0,
        fitted=lambda: ticks.append(1),
        **SMALL,
    )
    assert change.before == change.after
    assert change.extra_steps == (0, 0)
    assert len(ticks) == 4


def test_half_precision_weights_are_trained_in_float32(tiny_llama):
    low = copy.deepcopy(tiny_llama).bfloat16()
    task = small_task(tiny_llama)
    expected = steps_to_fit(copy.deepcopy(low).float(), seeds=[0], task=task, **SMALL)
    found = steps_to_fit(low, seeds=[0], task=task, **SMALL)
    assert next(low.parameters()).dtype == torch.bfloat16
    assert found.fits[0].losses == pytest.approx(expected.fits[0].losses, rel=1e-2)


def fits(*steps):
    return Plasticity(tuple(Fit(i, s, (1.0,), float(i)) for i, s in enumerate(steps)), 0.5, 100, 20, 1e-4)


@pytest.mark.parametrize(
    ("steps", "median", "span"),
    [
        ((10, 30, 20), 20.0, (10, 30)),
        ((10, None, 20), 20.0, (10, None)),
        ((None, None, 20), None, (20, None)),
        ((10, 20), 15.0, (10, 20)),
        ((10, None), None, (10, None)),
        ((None,), None, (None, None)),
    ],
)
def test_a_median_is_known_only_where_more_than_half_arrived(steps, median, span):
    result = fits(*steps)
    assert (result.median_steps, result.range_steps) == (median, span)


def test_bad_input_is_refused_by_name(tiny_llama):
    for options, complaint in (
        ({"seeds": []}, "seeds: expected at least one"),
        ({"seeds": [1, 1]}, r"seeds: expected at least one, each once, got \[1, 1\]"),
        ({"lr": 0}, "lr: expected a positive number, got 0"),
        ({"target": float("nan")}, "target: expected a positive number, got nan"),
        ({"max_steps": 5}, "fixed_steps: expected at most max_steps = 5, got 20"),
    ):
        with pytest.raises(ValueError, match=complaint):
            steps_to_fit(tiny_llama, **options)
    with pytest.raises(ValueError, match="sequences: expected at least 1, got 0"):
        RandomSequences(10, sequences=0)
    with pytest.raises(ValueError, match="Linear tells no vocabulary; pass task=RandomSequences"):
        steps_to_fit(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="loss of the probing task is nan after 2 steps; lower lr, 1e\\+30 now"):
        steps_to_fit(tiny_llama, seeds=[0], task=small_task(tiny_llama), lr=1e30)
    with pytest.raises(ValueError, match="only in the one before"):
        plasticity(tiny_llama, torch.nn.Linear(2, 2))
