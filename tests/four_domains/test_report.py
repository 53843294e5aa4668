"""The capacity of layers in the comparison and in the picture, on numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from sparse_cl.four_domains.figures import by_kind
from sparse_cl.four_domains.report import comparison


def layer(used, surviving=1.0, leak=None, width=10):
    return {"width": width, "used": used, "free": width - used, "surviving": surviving, "leak": leak}


def run(method, records):
    summary = dict.fromkeys(("learning_accuracy", "acc", "learned", "forgetting", "bwt", "fwt", "gain_lost"), 0.5)
    return {
        "method": method,
        "kind": "baseline" if method == "adamw" else "ours",
        "protects": False,
        "domains": ["code", "math"],
        "settings": {"lr": 1e-3, "split": "test", "autocast": None, "protect": None},
        "R": {"bits_per_byte": [[1.0, 1.0]] * 3},
        "R_reference": [None] * 3,
        "drift": [None] * 3,
        "summary": {**summary, "intransigence": None, "by_metric": {"bits_per_byte": summary}},
        "seconds": 1.0,
        "step_seconds": None,
        "state_bytes": 0,
        "peak_memory_bytes": 0,
        "domain_records": [{"domain": name, **record} for name, record in zip(("code", "math"), records, strict=True)],
    }


def test_the_comparison_has_capacity_least_surviving_and_largest_leak():
    records = [
        {"layers": {"a": layer(2), "b": layer(4, width=20)}},
        {"layers": {"a": layer(9, 0.04, 3e-9), "b": layer(4, 0.3, 2e-12, width=20)}},
    ]
    lines = comparison([run("adamw", [{}, {}]), run("orthogonal", records)]).splitlines()
    (header,) = [number for number, line in enumerate(lines) if "least surviving" in line]
    assert lines[header].split() == [
        "method",
        "after",
        "code",
        "after",
        "math",
        "least",
        "surviving",
        "largest",
        "leak",
    ]
    assert lines[header + 2].split() == ["orthogonal", "0.200", "0.550", "0.040", "3.0e-09"]
    assert lines[header + 3] == (
        "Warning: orthogonal, before math: less than 10% of the new domain's gradient survives in "
        "1 of 2 layers; the least, 4.00%, in a"
    )
    assert lines[header + 4] == ""


def test_without_a_method_that_reports_it_there_is_no_capacity():
    assert "capacity" not in comparison([run("adamw", [{}, {}])])


def test_one_domain_has_no_leak_to_report():
    text = comparison([run("orthogonal", [{"layers": {"a": layer(2)}}] * 2)])
    assert text.split("largest leak")[1].splitlines()[2].split() == ["orthogonal", "0.200", "0.200", "1.000", "-"]


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (
            ["layers.0.mlp.up.weight", "layers.0.attn.q.weight", "layers.1.mlp.up.weight", "head.weight"],
            {
                "up": ["layers.0.mlp.up.weight", "layers.1.mlp.up.weight"],
                "q": ["layers.0.attn.q.weight"],
                "head": ["head.weight"],
            },
        ),
        (
            ["h.0.attn.dense.weight", "h.0.mlp.dense.weight", "h.0.mlp.fc.weight"],
            {
                "attn.dense": ["h.0.attn.dense.weight"],
                "mlp.dense": ["h.0.mlp.dense.weight"],
                "fc": ["h.0.mlp.fc.weight"],
            },
        ),
        (["0.weight", "2.weight"], {"": ["0.weight", "2.weight"]}),
        (["dense.weight", "out.dense.weight"], {"dense": ["dense.weight"], "out.dense": ["out.dense.weight"]}),
    ],
)
def test_layers_are_grouped_by_kind_with_the_shortest_clear_name(names, kinds):
    assert by_kind(names) == kinds
