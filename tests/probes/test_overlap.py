"""Overlap of planted and of random active sets, with its null, its ceiling and its intervals."""

import json
import warnings
from itertools import combinations

import pytest
import torch
from cases.activation import planted, scored
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_cl.probes.overlap import overlap


def generator(seed):
    return torch.Generator().manual_seed(seed)


@given(st.data())
def test_the_iou_of_planted_sets_is_exact(data):
    width = data.draw(st.integers(6, 40))
    size = data.draw(st.integers(1, width))
    seed = data.draw(st.integers(0, 99))
    sets = [torch.randperm(width, generator=generator(seed + i))[:size].tolist() for i in range(3)]
    scores = {str(i): scored(planted(generator(i), active, width)) for i, active in enumerate(sets)}
    found = overlap(scores, [size / width], bootstrap=2)
    for pair, (a, b) in enumerate(combinations(sets, 2)):
        assert found.iou[pair, 0, 0] == len({*a} & {*b}) / len({*a} | {*b})
        assert found.mean_iou[pair, 0] == found.massive_iou[pair, 0, 0] == found.iou[pair, 0, 0]
    # Sets as clear as these are the same in every half and every resample.
    assert (found.ceiling == 1).all()
    assert torch.equal(found.interval[..., 0], found.iou) and torch.equal(found.interval[..., 1], found.iou)
    assert found.null.item() == pytest.approx(size / (2 * width - size))


@pytest.mark.parametrize(("width", "fraction"), [(60, 0.05), (60, 0.5), (200, 0.1)])
def test_random_activations_lie_within_the_null(width, fraction):
    inside = inside_mean = 0
    for seed in range(100):
        values = torch.randn(2, 16, 2, 3, width, generator=generator(seed))
        scores = {str(i): scored(one, 16) for i, one in enumerate(values)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = overlap(scores, [fraction], bootstrap=2)
        low, high = found.null_interval[0, 0].tolist()
        inside += low <= found.iou[0, 0, 0] <= high
        low, high = found.mean_null_interval[0].tolist()
        inside_mean += low <= found.mean_iou[0, 0] <= high
    assert inside >= 93
    assert inside_mean >= 93


def test_one_domain_twice_reaches_its_ceiling_with_enough_tokens():
    scale = 1.05 ** torch.arange(100)
    many = [torch.randn(64, 100, 1, 100, generator=generator(i)) * scale for i in range(2)]
    found = overlap({str(i): scored(values, 16) for i, values in enumerate(many)}, [0.1, 0.5], bootstrap=20)
    assert (found.mean_ceiling > 0.9).all()
    assert (found.mean_iou > 0.9).all()
    assert (found.mean_iou[0] >= found.mean_ceiling.amin(0) - 0.05).all()
    # With few tokens the ceiling says that little can be told.
    few = [values[:, :1] for values in many]
    with pytest.warns(UserWarning):
        assert (overlap({"a": scored(few[0]), "b": scored(few[1])}, [0.1]).mean_ceiling < 0.7).all()


def population(seed, width=100, shared=0.6):
    """The true means of two domains that share part of their neurons, and draws of sequences around them."""
    common, *own = torch.randn(3, width, generator=generator(seed), dtype=torch.float64)
    means = [2 + (shared**0.5 * common + (1 - shared) ** 0.5 * each).abs() for each in own]

    def draw(mean, number, sequences):
        noise = torch.randn(sequences, 1, 1, width, generator=generator(1000 + 2 * seed + number), dtype=torch.float64)
        return (mean + 1.5 * noise).clamp(min=0)

    return means, draw


def test_intervals_hold_the_overlap_of_the_population():
    inside = {0.1: 0, 0.3: 0}
    runs = 100
    for seed in range(runs):
        means, draw = population(seed)
        scores = {str(i): scored(draw(mean, i, 96), 96) for i, mean in enumerate(means)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = overlap(scores, list(inside), seed=seed)
        for at, fraction in enumerate(inside):
            size = round(fraction * 100)
            a, b = ({*mean.topk(size).indices.tolist()} for mean in means)
            low, high = found.interval[0, at, 0].tolist()
            inside[fraction] += low - 1e-9 <= len(a & b) / len(a | b) <= high + 1e-9
    assert min(inside.values()) >= 0.85 * runs


def test_brute_force_over_layers_and_domains():
    own = torch.rand(3, 1, 1, 4, 30, generator=generator(1))
    values = torch.randn(3, 10, 6, 4, 30, generator=generator(0)).abs() ** 3 * own
    values[1, 2, 3, 1, 5] = 1e6
    scores = {name: scored(one) for name, one in zip("abc", values, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = overlap(scores, (0.1, 0.34), bootstrap=5)
    for pair, (one, other) in enumerate(combinations(range(3), 2)):
        for at, size in enumerate((3, 10)):
            for layer in range(4):
                tops = {}
                for massive in (True, False):
                    means = [values[domain, :, :, layer].flatten(0, 1) for domain in (one, other)]
                    if not massive:
                        means = [torch.where(mean == 1e6, 0, mean) for mean in means]
                    a, b = ({*mean.mean(0).topk(size).indices.tolist()} for mean in means)
                    tops[massive] = len(a & b) / len(a | b)
                assert found.iou[pair, at, layer].item() == pytest.approx(tops[False])
                assert found.massive_iou[pair, at, layer].item() == pytest.approx(tops[True])
    torch.testing.assert_close(found.mean_iou, found.iou.mean(-1))
    assert (found.iou != found.massive_iou).any()


def test_the_ceiling_is_that_of_random_halves_of_the_groups():
    """Two groups only: each split is the same one."""
    values = torch.rand(2, 2, 5, 1, 20, generator=generator(3))
    scores = {name: scored(one) for name, one in zip("ab", values, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = overlap(scores, [0.3], bootstrap=2)
    for domain in range(2):
        a, b = ({*values[domain, half, :, 0].mean(0).topk(6).indices.tolist()} for half in range(2))
        assert found.ceiling[domain, 0, 0].item() == pytest.approx(len(a & b) / len(a | b))


def test_dead_neurons_are_not_in_common():
    values = torch.zeros(2, 16, 4, 1, 400)
    values[..., :4] = 1.0
    found = overlap({name: scored(one) for name, one in zip("ab", values, strict=True)}, [0.01, 0.25], bootstrap=5)
    assert found.iou[0, 0, 0] == 1
    low, high = found.null_interval[1, 0].tolist()
    assert low <= found.iou[0, 1, 0] <= high + 0.1


def test_one_group_has_neither_interval_nor_ceiling_and_says_so():
    values = torch.randn(2, 1, 40, 2, 30, generator=generator(0))
    scores = {"whole": scored(torch.randn(8, 40, 2, 30)), "single": scored(values[1])}
    with pytest.warns(UserWarning, match="overlap: single: all tokens are of one group of sequences"):
        found = overlap(scores, [0.1])
    record = found.to_json()
    json.dumps(record, allow_nan=False)
    assert record["interval"] == [[[[None, None], [None, None]]]]
    assert record["ceiling"] == [[[None, None]]] and record["mean_ceiling"] == [[None]]
    assert found.ceiling[0].isfinite().all()
    assert all(value is not None for value in record["iou"][0][0])


def test_too_few_tokens_are_warned_of_with_the_width():
    noise = [torch.randn(4, 1, 1, 20, generator=generator(i)) for i in range(2)]
    with pytest.warns(
        UserWarning, match=r"too few tokens: .* at a fraction of 0.1 is 0\.\d+ wide \(4 tokens of a and 4"
    ):
        overlap({"a": scored(noise[0]), "b": scored(noise[1])}, [0.1])


def test_the_record_has_a_ceiling_for_each_pair():
    values = torch.rand(3, 8, 4, 2, 30, generator=generator(0))
    scores = {name: scored(one) for name, one in zip("abc", values, strict=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = overlap(scores, (0.1, 0.2), bootstrap=5)
        again = overlap(scores, (0.1, 0.2), bootstrap=5)
    record = found.to_json()
    assert record["pairs"] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert record["k"] == [[3, 3], [6, 6]]
    for pair, (one, other) in enumerate([(0, 1), (0, 2), (1, 2)]):
        expected = (found.mean_ceiling[one] + found.mean_ceiling[other]) / 2
        assert record["mean_ceiling"][pair] == pytest.approx(expected.tolist())
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in found.tensors().items())


@settings(max_examples=10)
@given(st.integers(1, 60))
def test_all_neurons_are_in_common(width):
    values = torch.randn(2, 4, 2, 1, width)
    found = overlap({name: scored(one) for name, one in zip("ab", values, strict=True)}, [1.0], bootstrap=2)
    assert (found.iou == 1).all() and (found.null == 1).all() and (found.null_interval == 1).all()


def test_bad_input_is_named():
    one, other = (scored(torch.randn(4, 2, 1, width)) for width in (10, 12))
    with pytest.raises(ValueError, match="expected at least two domains, got one"):
        overlap({"one": one})
    with pytest.raises(ValueError, match="layer0 has 10 neurons in one and 12 in other"):
        overlap({"one": one, "other": other})
    with pytest.raises(ValueError, match="layer1 has no neurons in one and 10 in other"):
        overlap({"one": one, "other": scored(torch.randn(4, 2, 2, 10))})
    with pytest.raises(ValueError, match=r"got 1.2, which is 12 of a layer's 10 neurons"):
        overlap({"one": one, "other": one}, [1.2])
    with pytest.raises(ValueError, match="fractions: expected at least one"):
        overlap({"one": one, "other": one}, [])
    with pytest.raises(ValueError, match="bootstrap: expected at least 2"):
        overlap({"one": one, "other": one}, bootstrap=1)
