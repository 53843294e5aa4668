"""What a report says of activations, shared neurons, hubs and dormant ones is true, whatever the numbers are."""

import json
import warnings

import pytest
import torch
from cases.activation import planted, scored

from sparse_cl.probes.critical_sparsity import CriticalSparsity
from sparse_cl.probes.neurons import dormant, hubs
from sparse_cl.probes.overlap import overlap
from sparse_cl.report.sections import activation, neurons
from sparse_cl.report.sections import overlap as overlap_section

WIDTH = 100


def generator(seed):
    return torch.Generator().manual_seed(seed)


def plain(record):
    """As it is read from results.json."""
    return json.loads(json.dumps(record, allow_nan=False))


def activations(active):
    values = torch.rand(16, 8, 2, WIDTH, generator=generator(0)) * 1e-6
    values[..., :active] += 1
    return plain(scored(values).to_json())


def draw(section):
    """Every figure, as a page would hold it."""
    assert section.figures
    for figure in section.figures:
        figure.canvas.draw()
        assert figure.get_figwidth() <= 10
    return section.sentence


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((3, 4), "The claim 'below 5%' holds."),
        ((3, 60), "holds in some domains only"),
        ((60, 70), "does not hold"),
        ((99, 98), "does not hold"),
    ],
)
def test_the_claim_of_sparsity_is_held_against_the_numbers(counts, verdict):
    records = {name: activations(count) for name, count in zip("ab", counts, strict=True)}
    sentence = draw(activation.section(records))
    assert verdict in sentence
    assert f"On average {sum(counts) / 200:.1%} of the neurons carry 99% of a token's L1 mass" in sentence
    sparser = sum(counts) / 200 < 0.887  # what Gaussians need
    assert ("the model's are sparser." in sentence) == sparser
    assert ("no sparser." in sentence) == (not sparser)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.97, 0.96), "at most 4.0% are active, and the claim holds."),
        ((0.97, 0.5), "at most 50.0% are active, and the claim holds in some domains only."),
        ((0.75, 0.5), "at most 50.0% are active, and the claim does not hold."),
    ],
)
def test_critical_sparsity_is_told_as_it_was_measured(shares, expected):
    critical = {
        name: CriticalSparsity(s, (s - 0.01, s), 0.01, 1.0, ((0.0, 1.0), (s, 1.005), (0.99, 1.2)), 100).to_json()
        for name, s in zip("ab", shares, strict=True)
    }
    section = activation.section({"a": activations(50)}, plain(critical))
    assert expected in draw(section) and "all that was tried" not in section.sentence
    assert f"dropped: {shares[0]:.1%} [{shares[0] - 0.01:.1%}, {shares[0]:.1%}] in a; " in section.sentence
    assert len(section.figures) == 3


def test_a_loss_that_never_rose_is_told():
    critical = CriticalSparsity(0.99, None, 0.01, 1.0, ((0.0, 1.0), (0.99, 0.9)), 100)
    sentence = activation.section({"a": activations(50)}, plain({"a": critical.to_json()})).sentence
    assert "dropped: 99.0% in a, which is all that was tried." in sentence


def test_parts_of_a_gated_mlp_are_columns_beside_their_own_chance(tiny_llama):
    from sparse_cl.probes.activation import ActivationProbe

    ids = torch.randint(1, 90, (4, 12), generator=generator(0))
    record = plain(ActivationProbe(tiny_llama).run([{"input_ids": ids}]).to_json())
    section = activation.section({"code": record})
    draw(section)
    assert section.table.header[2:] == tuple(f"{p}, {s}" for p in ("gate", "up", "product") for s in ("90%", "99%"))
    assert section.table.rows[-2] == ("chance", "", "64.6%", "88.7%", "64.6%", "88.7%", "52.0%", "81.5%")


def overlapped(sets):
    scores = {name: scored(planted(generator(i), s, WIDTH)) for i, (name, s) in enumerate(sets.items())}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plain(overlap(scores, [0.1], bootstrap=5).to_json())


def test_domains_without_neurons_in_common_are_told_to_be_as_chance():
    sentence = draw(overlap_section.section(overlapped({"a": list(range(10)), "b": list(range(9, 19))})))
    assert "share an IoU of 0.053" in sentence
    assert "1.0 times chance (0.053" in sentence
    assert "That is what chance gives" in sentence


def test_domains_with_the_same_neurons_are_told_to_be_one():
    sentence = draw(overlap_section.section(overlapped({name: list(range(10)) for name in "abc"})))
    assert "share an IoU of 1.000" in sentence
    assert "Domains share as much as one domain with itself" in sentence


def test_domains_in_between_are_told_to_be_so():
    sets = {"a": list(range(10)), "b": list(range(4, 14)), "c": list(range(5, 15))}
    section = overlap_section.section(overlapped(sets))
    sentence = draw(section)
    assert "The most is that of b and c, 0.818" in sentence
    assert "the least that of a and c, 0.333" in sentence
    assert "All of it is more than chance gives, and less than one domain shares with itself" in sentence
    assert section.table.rows[0][0] == "a and b" and section.table.rows[0][1].startswith("0.429")


def test_some_pairs_above_chance_are_counted():
    sets = {"a": list(range(10)), "b": list(range(10)), "c": list(range(50, 60))}
    assert "Above chance is 1 of 3 pairs, below it 0." in draw(overlap_section.section(overlapped(sets)))
    wide = {"a": list(range(50)), "b": list(range(50, 100))}
    scores = {name: scored(planted(generator(i), s, WIDTH)) for i, (name, s) in enumerate(wide.items())}
    record = plain(overlap(scores, [0.5], bootstrap=5).to_json())
    assert "No pair is above chance, and 1 of 1 below it" in draw(overlap_section.section(record))


def test_single_groups_have_no_interval_to_show():
    scores = {name: scored(torch.rand(1, 9, 2, WIDTH)) for name in "ab"}
    with pytest.warns(UserWarning, match="one group"):
        record = plain(overlap(scores).to_json())
    section = overlap_section.section(record)
    assert "two halves" not in draw(section)
    assert "[" not in section.table.rows[0][1]


def test_massive_activations_are_told_of_where_they_matter():
    values = {}
    for i, name in enumerate("ab"):
        values[name] = planted(generator(i), list(range(10 * i, 10 * i + 10)), WIDTH)
        values[name][0, 0, 0, 50:55] = 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = overlap({name: scored(one) for name, one in values.items()}, [0.1], bootstrap=5).to_json()
    assert "With massive activations an IoU is up to 0.33 different." in draw(overlap_section.section(plain(record)))


def test_hubs_are_held_against_chance():
    same = {name: scored(planted(generator(i), [3, 4, 5, 6, 7], WIDTH)) for i, name in enumerate("abc")}
    own = {name: scored(planted(generator(i), list(range(5 * i, 5 * i + 5)), WIDTH)) for i, name in enumerate("abc")}
    told = draw(neurons.section(plain(dormant(same).to_json()), plain(hubs(same).to_json())))
    assert "5 of 100 neurons (5.00%) are hubs, among the top 5% in all 3 domains" in told
    assert "0.0125 in common and identical ones 5: more than chance in every layer." in told
    told = draw(neurons.section(plain(dormant(own).to_json()), plain(hubs(own).to_json())))
    assert "0 of 100 neurons (0.00%) are hubs" in told and ": no more than chance." in told


def test_the_agreement_with_weights_is_held_against_chance():
    scores = {name: scored(planted(generator(i), [3, 4, 5, 6, 7], WIDTH)) for i, name in enumerate("ab")}
    records = plain(dormant(scores).to_json()), plain(hubs(scores).to_json())
    for iou, expected in ((0.0, "no more than chance in any layer"), (0.9, "more than chance in 1 of 1 layers")):
        weights = {
            "layer0": {"iou": iou, "null": 0.026, "null_interval": [0, 0.11], "ceiling": 1.0, "correlation": None}
        }
        assert expected in draw(neurons.section(*records, weights))


def test_dormant_neurons_are_counted_and_none_is_invented():
    values = torch.rand(2, 16, 4, 1, WIDTH, generator=generator(0)) + 0.5
    alive = {name: scored(one) for name, one in zip("ab", values, strict=True)}
    section = neurons.section(plain(dormant(alive).to_json()), plain(hubs(alive).to_json()))
    assert "No neuron is dormant in any domain, even at τ = 0.1." in draw(section)
    values[:, :, :, :, :2] = 0
    values[1, :, :, :, 2:7] = 0
    dying = {name: scored(one) for name, one in zip("ab", values, strict=True)}
    told = draw(neurons.section(plain(dormant(dying).to_json())))
    assert "At τ = 0.1 2 of 100 neurons (2.00%) are dormant in every domain; most in b, 7 (7.00%)." in told


def test_layers_are_named_in_the_table():
    record = plain(dormant(scored(torch.rand(4, 2, 2, 10))).to_json())
    assert [row[0] for row in neurons.section(record).table.rows] == ["layer0", "layer1"]
