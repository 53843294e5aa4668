"""The report's words on capacity are true of its numbers."""

import pytest

from sparse_cl.probes.capacity import forecast, forecast_of_model
from sparse_cl.report.sections.capacity import section


def record(used, null, surviving=None, width=100, neurons=None):
    domains = ["code", "math", "medical"][: len(used)]
    layer = {
        "width": width,
        "layers": ["it"],
        "alone": used,
        "alone_halves": [[n, n + 1] for n in used],
        "used": used,
        "used_null": null,
        "repeated": [1] * len(used),
        "surviving": surviving,
        "free": width - used[-1],
        "left": None if surviving is None else (width - used[-1]) / width * surviving[-1],
        "forecast": forecast(used, width),
    }
    return {
        "domains": domains,
        "energy": 0.95,
        "tokens": dict.fromkeys(domains, 10),
        "layers": {"blocks.0.it": layer, "blocks.1.it": layer},
        "neurons": neurons or {},
        "forecast": forecast_of_model([layer["forecast"]] * 2),
    }


def test_domains_that_share_directions():
    sentence = section(record([30, 38, 40], [30, 60, 70], [1.0, 0.5, 0.125])).sentence
    assert "After 3 domains 40% of the input directions are in use" in sentence
    assert "30% after code alone; 70% if the domains' directions were random" in sentence
    assert "later domains add 25% of what unrelated ones would" in sentence
    assert "30 more fit in the median layer and 30 in the one that is full first" in sentence
    assert "of the gradient of medical, 12% survives" in sentence and "12.5% in the worst" in sentence


def test_domains_that_share_nothing():
    sentence = section(record([30, 60, 69], [30, 60, 70])).sentence
    assert "add as much as unrelated ones would: they share almost no directions" in sentence
    assert "survives" not in sentence


def test_a_domain_that_adds_nothing_and_a_single_one():
    assert "no end is in sight" in section(record([30, 30], [30, 60])).sentence
    alone = section(record([30], [30])).sentence
    assert alone == "After 1 domain 30% of the input directions are in use, mean over layers (30% after code alone)."


def test_bars_and_table_hold_the_numbers():
    neurons = {"blocks.0.mlp": {"neurons": 10, "alone": [3, 4], "used": [3, 6], "free": 4}}
    made = section(record([30, 40], [30, 60], [1.0, 0.4], neurons=neurons))
    assert "of the neurons, 60% carry most" in made.sentence
    row = made.table.rows[0]
    assert row == ("blocks.0.it", "100", "30–31", "40–41", "30", "40", "60", "1", "0.40", "0.24", "6 (6–6)")
    bars = made.figures[0].axes[0].patches
    assert bars[1].get_data().values == pytest.approx([0.4, 0.4])
    assert made.figures[0].axes[1].patches[1].get_data().values == pytest.approx([0.6])
