from __future__ import annotations

import json
import math

import pytest
import torch

from sparse_cl.probes.gradient_cosines import compare_gradients
from sparse_cl.probes.gradients import GradientProbe

ROWS, COLUMNS = 24, 32


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_gradient(draws, seed=0, **options):
    """What the probe gives for a 24 x 32 layer whose gradient in batch i is draws[i]."""
    layer = torch.nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float64)
    loss = lambda m, batch: ((m.weight * batch).sum(), 1)  # noqa: E731
    return GradientProbe(layer, {"layer": layer}, loss=loss, seed=seed, **options).run(draws)


def with_cosine(cosine, seed=0):
    """Two matrices of norm 1 with this cosine."""
    q, _ = torch.linalg.qr(normal(seed, ROWS * COLUMNS, 2))
    return q[:, 0].view(ROWS, COLUMNS), (cosine * q[:, 0] + math.sqrt(1 - cosine**2) * q[:, 1]).view(ROWS, COLUMNS)


@pytest.mark.parametrize("cosine", [-1.0, -0.3, 0.0, 0.5, 1.0])
def test_known_gradients_have_their_cosine_exactly(cosine):
    a, b = with_cosine(cosine)
    found = compare_gradients({"a": mean_gradient([3 * a] * 4), "b": mean_gradient([b / 7] * 4)})
    assert found.pairs == (("a", "b"),)
    for cosines in (found.layers["layer"], found.model):
        assert cosines.cosine[0] == pytest.approx(cosine, abs=1e-12)
        assert cosines.null == pytest.approx(1.96 / math.sqrt(ROWS * COLUMNS))
        # Gradients without noise: nothing to correct, an interval of a point.
        assert cosines.ceiling[0] == pytest.approx(1)
        assert cosines.corrected[0] == pytest.approx(cosine, abs=1e-12)
        assert cosines.low[0] == pytest.approx(cosine, abs=1e-6)
        assert cosines.high[0] == pytest.approx(cosine, abs=1e-6)


def test_the_whole_model_is_all_layers_as_one_vector(tiny_llama):
    model = tiny_llama.double()
    domains = {}
    for number, domain in enumerate("abc"):
        ids = torch.randint(1, 256, (4, 12), generator=torch.Generator().manual_seed(number))
        domains[domain] = GradientProbe(model).run([{"input_ids": ids[i : i + 1]} for i in range(4)])
    found = compare_gradients(domains)
    assert found.pairs == (("a", "b"), ("a", "c"), ("b", "c"))
    for (a, b), cosine in zip(found.pairs, found.model.cosine, strict=True):
        vectors = [torch.cat([g.flatten() for g in domains[d].layers.values()]) for d in (a, b)]
        expected = torch.nn.functional.cosine_similarity(*vectors, 0)
        assert cosine == pytest.approx(float(expected), rel=1e-10)
    json.dumps(found.to_json(), allow_nan=False)


def test_input_directions_that_are_shared_are_counted():
    q, _ = torch.linalg.qr(normal(0, COLUMNS, 5))
    left, _ = torch.linalg.qr(normal(1, ROWS, 4))
    scale = torch.tensor([4.0, 3, 2, 1], dtype=torch.float64)
    a = left * scale @ q[:, :4].T
    b = left.flip(1) * scale @ q[:, [4, 1, 2, 3]].T  # the same but for one, and other outputs
    found = compare_gradients({"a": mean_gradient([a] * 2), "b": mean_gradient([b] * 2)}, rank=4).layers["layer"]
    assert found.overlap[0] == pytest.approx(3 / 4, abs=1e-9)
    assert found.overlap_null[0] == 4 / COLUMNS
    assert found.angles[0] == pytest.approx([0, 0, 0, math.pi / 2], abs=1e-6)
    # Only the directions that a gradient has are compared.
    wide = compare_gradients({"a": mean_gradient([a] * 2), "b": mean_gradient([b] * 2)}, rank=8).layers["layer"]
    assert wide.overlap[0] == pytest.approx(3 / 4, abs=1e-9)


def population(cosine, noise, batches, seed):
    """Two domains whose true gradients have this cosine, each batch's with so much noise."""
    means = with_cosine(cosine)
    size = noise / math.sqrt(ROWS * COLUMNS)
    draws = [
        [m + size * normal(1000 * seed + 100 * i + j, ROWS, COLUMNS) for j in range(batches)]
        for i, m in enumerate(means)
    ]
    return draws


@pytest.mark.parametrize(("cosine", "noise"), [(0.0, 1.0), (0.6, 1.0), (0.6, 2.0)])
def test_intervals_hold_what_another_sample_shows_and_the_correction_finds_the_true_cosine(cosine, noise):
    inside, inside_corrected, corrected, raw = 0, 0, [], []
    attenuated = cosine / (1 + noise**2 / 16)
    for seed in range(60):
        a, b = population(cosine, noise, 16, seed)
        found = compare_gradients({"a": mean_gradient(a), "b": mean_gradient(b)}).model
        inside += found.low[0] <= attenuated <= found.high[0]
        inside_corrected += found.low[0] / found.ceiling[0] <= cosine <= found.high[0] / found.ceiling[0]
        raw.append(found.cosine[0])
        corrected.append(found.corrected[0])
    # Sixteen groups make a bootstrap interval somewhat narrow.
    assert inside >= 52 and inside_corrected >= 50
    assert sum(raw) / 60 == pytest.approx(attenuated, abs=0.01)
    assert sum(corrected) / 60 == pytest.approx(cosine, abs=0.01)


def test_intervals_from_sketches_are_those_from_whole_gradients():
    a, b = population(0.6, 2.0, 16, 0)
    found = compare_gradients({"a": mean_gradient(a), "b": mean_gradient(b)}, bootstrap=1000).model
    exact = torch.nn.functional.cosine_similarity(sum(a).flatten(), sum(b).flatten(), 0)
    generator, drawn = torch.Generator().manual_seed(1), []
    for _ in range(1000):
        sums = [sum(draws[i] for i in torch.randint(16, (16,), generator=generator)) for draws in (a, b)]
        drawn.append(torch.nn.functional.cosine_similarity(sums[0].flatten(), sums[1].flatten(), 0))
    drawn = torch.stack(drawn)
    below, above = (drawn - drawn.mean()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert found.low[0] == pytest.approx(float(exact - above), abs=0.01)
    assert found.high[0] == pytest.approx(float(exact - below), abs=0.01)


def test_isotropic_noise_stays_inside_its_null():
    inside = 0
    for seed in range(100):
        pair = {
            "a": mean_gradient([normal(2 * seed, ROWS, COLUMNS)]),
            "b": mean_gradient([normal(2 * seed + 1, ROWS, COLUMNS)]),
        }
        found = compare_gradients(pair).model
        inside += abs(found.cosine[0]) <= found.null
        assert found.low == [None] and found.ceiling == [None]  # of one batch nothing is known
    assert inside >= 93


def test_a_gradient_of_noise_alone_is_not_corrected():
    noise = [normal(seed, ROWS, COLUMNS) for seed in range(16)]
    signal = [with_cosine(0)[0]] * 16
    found = compare_gradients({"noise": mean_gradient(noise), "signal": mean_gradient(signal)}).model
    assert abs(found.reliability["noise"]) < 0.2
    assert found.corrected == [None]


def test_too_few_tokens_are_warned_about():
    # In four directions, a cosine of noise is anything.
    draws = [[torch.zeros(ROWS, COLUMNS, dtype=torch.float64) for _ in range(6)] for _ in range(2)]
    for seed, own in enumerate(draws):
        for number, draw in enumerate(own):
            draw[0, :4] = normal(10 * seed + number, 4)
    with pytest.warns(UserWarning, match=r"a and b has an interval \d\.\d\d wide, from 6 and 6 tokens"):
        compare_gradients({"a": mean_gradient(draws[0]), "b": mean_gradient(draws[1])})


def test_a_layer_without_gradient_has_none():
    zero, other = [torch.zeros(ROWS, COLUMNS, dtype=torch.float64)] * 2, [normal(0, ROWS, COLUMNS)] * 2
    found = compare_gradients({"a": mean_gradient(zero), "b": mean_gradient(other)}).layers["layer"]
    assert (found.cosine, found.low, found.overlap, found.corrected) == ([None],) * 4


def test_errors_name_what_is_wrong():
    one = mean_gradient([normal(0, ROWS, COLUMNS)] * 2)
    with pytest.raises(ValueError, match="at least two domains, got a"):
        compare_gradients({"a": one})
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        compare_gradients({"a": one, "b": one}, rank=0)
    with pytest.raises(ValueError, match="a was run with seed 0 and b with seed 1"):
        compare_gradients({"a": one, "b": mean_gradient([normal(0, ROWS, COLUMNS)] * 2, seed=1)})
    small = torch.nn.Linear(4, 4)
    other = GradientProbe(small, {"layer": small}, loss=lambda m, batch: (m(batch).sum(), 1)).run([torch.ones(2, 4)])
    with pytest.raises(ValueError, match=r"layer has \(24, 32\) weights in a and \(4, 4\) in b"):
        compare_gradients({"a": one, "b": other})
