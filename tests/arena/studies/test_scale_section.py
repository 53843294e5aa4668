from __future__ import annotations

import math

import pytest

from benchmarks.arena.studies.scale_section import section


def model(width, seed, *, family="llama", cosine=-0.5, overlap=0.0, scatter=0.02):
    """A summary whose measures go as powers of the width, with a little scatter by seed."""
    wobble = math.exp(scatter * (seed - 1))
    return {
        "model": f"{family}-{width}-{seed}",
        "family": family,
        "width": width,
        "layers": 2,
        "parameters": 12 * width**2,
        "overlap": {"share": 0.05, "iou": 0.3 * (width / 32) ** overlap * wobble, "null": 0.026, "ceiling": 0.9},
        "cosine": {
            "mean": 0.1,
            "absolute": 0.4 * (width / 32) ** cosine * wobble,
            "null": 0.8 / width,
            "ceiling": 0.9,
            "corrected": None,
        },
        "sparsity": {"needed": 0.7, "null": 0.82},
    }


def family(**options):
    return [model(width, seed, **options) for width in (32, 64, 128, 256, 512) for seed in range(3)]


@pytest.mark.parametrize(
    ("cosine", "said"),
    [
        (-0.5, "in agreement with −0.5"),
        (-0.2, "a slower fall than −0.5"),
        (-1.0, "a faster fall than −0.5"),
        (0.0, "no change with width is sure, and −0.5 is excluded"),
        (0.3, "a rise with width, against the conjecture"),
    ],
)
def test_the_exponent_is_judged_as_it_was_measured(cosine, said):
    found = section(family(cosine=cosine))
    assert said in found.sentence
    sign = f"{cosine:+.2f}".replace("-", "−")
    assert f"the mean |cosine| of llama goes as width^{sign} ± 0.0" in found.sentence
    assert "Of 15 models from width 32 to 512" in found.sentence


def test_scatter_that_allows_anything_says_so():
    found = section(family(cosine=-0.3, scatter=2.0))
    assert "no change with width is sure, and −0.5 is not excluded" in found.sentence


def test_families_are_fitted_apart_and_single_models_only_drawn():
    extra = model(256, 0, family="base")
    found = section([*family(family="random"), *family(family="trained", cosine=0.0), extra])
    assert "of random goes as width^−0.50" in found.sentence and "of trained goes as width^+0.00" in found.sentence
    assert "of base" not in found.sentence
    assert len(found.table.rows) == 31
    labels = found.figures[0].axes[1].get_legend_handles_labels()[1]
    assert {label.split(":")[0] for label in labels} >= {"random", "trained", "base", "null"}


def test_one_model_and_missing_probes():
    alone = {**model(64, 0), "cosine": None, "sparsity": None}
    found = section([alone])
    assert found.sentence.startswith("Of 1 model at width 64")
    assert "too few models" in found.sentence and "|cosine| is" not in found.sentence
    assert found.table.rows[0][6] == "–"
    with pytest.raises(ValueError, match="at least one summary"):
        section([])
