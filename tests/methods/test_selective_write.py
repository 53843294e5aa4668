"""Selective write: hubs stay bit for bit, and the rest moves by gains that fall with usage."""

from __future__ import annotations

import pytest
import torch
from cases.methods import copy_of, domain, learn, weights
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparse_cl.methods import SelectiveWrite
from sparse_cl.methods.selective_write import gains_of
from sparse_cl.probes import ActivationProbe, dormant

MLPS = [f"model.layers.{number}.mlp" for number in range(2)]


@given(
    usage=arrays(float, st.integers(1, 40), elements=st.floats(0, 50)),
    closed=st.floats(0, 0.99),
    sharpness=st.floats(0, 500),
)
def test_gains_fall_with_usage_and_the_most_used_are_closed(usage, closed, sharpness):
    usage, tiny = torch.from_numpy(usage), torch.finfo(torch.float32).tiny
    gain = gains_of(usage, closed, sharpness)
    order = usage.argsort(stable=True)
    assert bool(((gain >= 0) & (gain <= 1)).all())
    assert int((gain == 0).sum()) == round(closed * len(usage))
    opened = order[gain[order] > 0]
    assert bool((gain[opened].diff() <= 0).all()), "no neuron takes more than one that is used less"
    if 0 < len(opened) < len(usage):
        assert float(usage[gain == 0].min()) >= float(usage[opened].max())
    torch.testing.assert_close(gain[opened], (1 + usage[opened]).pow(-sharpness).clamp(min=tiny).float())


def test_a_dormant_neuron_takes_the_whole_step_and_the_average_one_less():
    gain = gains_of(torch.tensor([0.0, 1.0, 3.0, 100.0]), closed=0.25, sharpness=2.0)
    assert gain.tolist() == [1.0, 0.25, 0.0625, 0.0]


def test_hubs_stay_bit_for_bit_and_steps_are_those_of_adamw_times_the_gain(tiny_llama):
    method = SelectiveWrite(closed=0.25, sharpness=2.0, rest=0.0)
    model = learn(method, tiny_llama, domain(0))
    assert method.masks == {}, "in the first domain there is nothing to protect"
    usage = dormant(ActivationProbe(model, tokens="all").run(domain(0))).scores["all data"]
    for mlp in MLPS:
        torch.testing.assert_close(method.usage[mlp], usage[mlp])

    before, twin = weights(model), copy_of(model)
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    twin.train()
    loss = twin(**domain(1)[0]).loss
    loss.backward()
    adamw.step()
    model = learn(method, model, domain(1), steps=1)
    after, dense = weights(model), weights(twin)
    inside = set()
    for mlp in MLPS:
        gain = gains_of(usage[mlp], 0.25, 2.0)
        assert int((gain == 0).sum()) == 6
        for name, shape in (("gate_proj", (-1, 1)), ("up_proj", (-1, 1)), ("down_proj", (1, -1))):
            name = f"{mlp}.{name}.weight"
            inside.add(name)
            moved = after[name] - before[name]
            closed = (gain == 0).view(shape).expand_as(moved)
            assert torch.equal(after[name][closed], before[name][closed])
            # Clipping scales a gradient, and Adam's first step is its sign.
            expected = gain.view(shape) * (dense[name] - before[name])
            torch.testing.assert_close(moved, expected, rtol=2e-3, atol=2e-6)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in inside)


def test_what_belongs_to_no_neuron_has_its_own_gain(tiny_llama):
    moved = {}
    start = weights(learn(SelectiveWrite(), copy_of(tiny_llama), domain(0)))
    for rest in (1.0, 0.25):
        method = SelectiveWrite(rest=rest)
        model = learn(method, copy_of(tiny_llama), domain(0))
        after = weights(learn(method, model, domain(1), steps=1))
        moved[rest] = {name: after[name] - start[name] for name in start}
    for name in start:
        scale = 1.0 if ".mlp." in name else 0.25
        assert float(moved[1.0][name].norm()) > 0
        torch.testing.assert_close(moved[0.25][name], scale * moved[1.0][name], rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*use all but:UserWarning")
def test_usage_is_the_mean_over_the_protected_text_and_the_domains(tiny_llama):
    method, scores = SelectiveWrite(closed=0.25), []
    method.protect(tiny_llama, domain(3))
    scores.append(dormant(ActivationProbe(tiny_llama, tokens="all").run(domain(3))).scores["all data"])
    start, model = weights(tiny_llama), tiny_llama
    for number in range(2):
        hubs = {mlp: method.usage[mlp].topk(6).indices for mlp in MLPS}
        model = learn(method, model, domain(number))
        for mlp in MLPS:
            found, before = (w[f"{mlp}.up_proj.weight"] for w in (weights(model), start))
            assert torch.equal(found[hubs[mlp]], before[hubs[mlp]]), "from the first domain on"
        start = weights(model)
        scores.append(dormant(ActivationProbe(model, tokens="all").run(domain(number))).scores["all data"])
        for mlp in MLPS:
            torch.testing.assert_close(method.usage[mlp], torch.stack([s[mlp] for s in scores]).mean(0))


def test_a_protected_text_is_remembered_by_a_run_that_goes_on(tiny_llama, tmp_path):
    method = SelectiveWrite()
    method.protect(tiny_llama, domain(3))
    learn(method, tiny_llama, domain(0), steps=1, folder=tmp_path)
    resumed = SelectiveWrite()
    resumed.restore(copy_of(tiny_llama), [tmp_path])
    for mlp in MLPS:
        assert torch.equal(resumed.usage[mlp], method.usage[mlp])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"closed": 1.0}, r"closed: expected a share of the neurons in \[0, 1\), got 1.0, which leaves none to train"),
        ({"closed": -0.1}, r"closed: expected a share of the neurons in \[0, 1\), got -0.1$"),
        ({"sharpness": -1.0}, "sharpness: expected a number of at least 0, got -1.0"),
        ({"sharpness": float("inf")}, "sharpness: expected a number of at least 0, got inf"),
        ({"rest": 1.5}, r"rest: expected a gain in \[0, 1\], got 1.5"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelectiveWrite(**arguments)


def test_a_share_that_rounds_to_all_neurons_is_refused_before_anything_runs(tiny_llama):
    with pytest.raises(ValueError, match=r"closed: 0.99 of the 24 neurons of model.layers.0.mlp are all of them"):
        SelectiveWrite(closed=0.99).check(tiny_llama)


@pytest.mark.parametrize("rest", [0.0, 0.5])
def test_what_was_frozen_stays_so_and_the_rest_is_open_afterwards(tiny_llama, rest):
    method, name = SelectiveWrite(rest=rest), "model.layers.0.mlp.up_proj.weight"
    frozen = {name, "model.norm.weight"}
    for parameter in frozen:
        tiny_llama.get_parameter(parameter).requires_grad_(False)
    before = weights(tiny_llama)
    for number in range(2):
        learn(method, tiny_llama, domain(number))
        assert {n for n, p in tiny_llama.named_parameters() if not p.requires_grad} == frozen
    after = weights(tiny_llama)
    assert {n for n in after if torch.equal(after[n], before[n])} == frozen
