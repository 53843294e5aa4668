"""The main table, of runs whose losses at equal learning are known."""

from __future__ import annotations

import pytest
from cases.runs import run

from benchmarks.arena import main_table

OF_SEED = (0.0, 0.3, 0.7)
"""By seed what every method loses more, far more than methods differ: intervals are narrow where seeds are paired."""


def runs_of(entry, method, more, rates=(1, 0.5, 2), seeds=(0, 1, 2), spread=0.1, **options):
    """Runs that lose a tenth of what they learn and `more` of their gain, by seed `spread` of it more or less."""
    found = []
    for factor in rates:
        for seed in seeds:
            learned = factor**0.5 * (1 + 0.01 * seed)
            lost = 0.1 * learned + OF_SEED[seed] + more + spread * abs(more) * (seed - 1)
            R = ((4.0, 4.0), (4.0 - learned, 4.0), (4.0 - learned + lost * learned, 4.0 - learned))
            made = run(method, seed, 1e-3 * factor, R, method_options={method: options} if options else {})
            found.append({**made, "name": f"{entry}{'' if factor == 1 else f'@{factor:g}'}-given-seed{seed}"})
    return found


ELASTIC = runs_of("elastic", "elastic", 0.0, strength=5.0)
NULL = runs_of("null-one", "elastic-null", 0.2, null="one")


@pytest.mark.parametrize(
    ("replay", "spread", "said"),
    [
        (0.1, 0.1, "`elastic` loses least at equal learning, 10.0 ± 2.5 points of the gain less than `replay-5`."),
        (-0.1, 0.1, "`replay-5` loses least at equal learning, 10.0 ± 2.5 points of the gain less than `elastic`."),
        (0.1, 1, "`elastic` and `replay-5` lose least at equal learning, and are not told apart (10.0 ± 24.8 points"),
    ],
)
def test_it_says_who_loses_least_and_what_the_pull_has_over_its_nulls(replay, spread, said):
    runs = [*ELASTIC, *NULL, *runs_of("replay-5", "replay-5", replay, spread=spread)]
    runs += runs_of("joint", "joint", 0.0, rates=(1,))
    text = main_table.table(runs)
    assert text.startswith(said)
    assert "Nulls of the pull lose more, in points: with one strength for all 20.0 ± 5.0." in text
    assert "Not compared" not in text
    rows = {row[0]: row for row in main_table.rows(runs)}
    assert rows["elastic"][1:4] == ["0.001, strength 5.0", "3", "1.01 ± 0.02"] and rows["elastic"][-2:] == ["", ""]
    assert rows["joint"][-2:] == ["", ""], "a bound forgets nothing"
    assert rows["null-one"][-2:] == ["+20.0 ± 5.0", "0.71 to 1.43"]


def test_a_row_that_learns_more_or_less_than_ours_at_all_rates_is_named():
    far = runs_of("lora", "lora", 0.1, rates=(9, 16, 25))
    far = [{**one, "name": one["name"].replace("@9", "")} for one in far]
    text = main_table.sentence([*ELASTIC, *NULL, *far, *runs_of("ewc", "ewc", 0.3)])
    assert "points of the gain less than `ewc`. Not compared, as they learn more at all rates: `lora`." in text


def test_a_point_that_one_seed_lacks_leaves_that_seed_a_shorter_curve():
    runs = [one for one in (*ELASTIC, *NULL) if one["name"] != "null-one@2-given-seed1"]
    rows = {row[0]: row for row in main_table.rows(runs)}
    assert rows["null-one"][-2:] == ["+20.0 ± 5.0", "0.71 to 1.29"]


def test_a_row_without_curves_or_of_failed_runs_is_not_compared():
    failed = [{**one, "failed": "OutOfMemoryError"} for one in runs_of("lora", "lora", 0.1)]
    ahead = runs_of("sfa", "sfa", 0.1, rates=(2,))  # its curve was run before its chosen rate
    runs = [*ELASTIC, *failed, *ahead, *runs_of("ewc", "ewc", 0.1, rates=(1,), seeds=(0,))]
    assert main_table.sentence(runs).startswith("No two rows have curves yet")
    rows = main_table.rows(runs)
    assert sorted(row[0] for row in rows) == ["elastic", "ewc"]
    (ewc,) = (row for row in rows if row[0] == "ewc")
    assert ewc[2:4] == ["1", "1.00"] and ewc[-2:] == ["", ""]
