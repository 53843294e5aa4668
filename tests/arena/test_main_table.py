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
            made = run(method, seed, 1e-3 * factor, R, options, method_options={method: options} if options else {})
            found.append({**made, "name": f"{entry}{'' if factor == 1 else f'@{factor:g}'}-given-seed{seed}"})
    return found


WHERE = "where both have learned 0.71 to 1.43."
MORE = f"points of the gain more, {WHERE}"
NULLS = "Nulls lose more than the pull of their strength, in points:"
ONE_OF_TWO = "At equal learning `elastic` loses less than 1 of 2 rows:"
ELASTIC = runs_of("elastic", "elastic", 0.0, strength=5.0)
NULL = runs_of("null-one", "elastic-null", 0.2, null="one", strength=5.0)


@pytest.mark.parametrize(
    ("replay", "spread", "said"),
    [
        (0.1, 0.1, f"`elastic` loses least at equal learning: `replay-5` loses 10.0 ± 2.5 {MORE}"),
        (-0.1, 0.1, f"{ONE_OF_TWO} `ewc` loses 30.0 ± 7.5 {MORE} `replay-5` loses 10.0 ± 2.5 points less, {WHERE}"),
        (0.1, 1, f"{ONE_OF_TWO} `ewc` loses 30.0 ± 7.5 {MORE} Not told apart from it: `replay-5` (+10.0 ± 24.8)."),
    ],
)
def test_it_says_who_loses_least_and_what_the_pull_has_over_its_nulls(replay, spread, said):
    runs = [*ELASTIC, *NULL, *runs_of("replay-5", "replay-5", replay, spread=spread), *runs_of("ewc", "ewc", 0.3)]
    runs += runs_of("joint", "joint", 0.0, rates=(1,))
    text = main_table.table(runs)
    assert text.startswith(said)
    assert f"{NULLS} with one strength for all 20.0 ± 5.0 at strength 5." in text
    assert "Not compared" not in text
    rows = {row[0]: row for row in main_table.rows(runs)}
    assert rows["elastic"][1:5] == ["ours", "0.001, strength 5.0", "3", "1.01 ± 0.02"]
    assert rows["elastic"][-2:] == ["", ""]
    assert rows["joint"][-2:] == ["", ""], "a bound forgets nothing"
    assert rows["null-one"][1] == "null" and rows["null-one"][-2:] == ["+20.0 ± 5.0", "0.71 to 1.43"]


def test_a_row_that_learns_more_or_less_than_ours_at_all_rates_is_named():
    far = runs_of("lora", "lora", 0.1, rates=(9, 16, 25))
    far = [{**one, "name": one["name"].replace("@9", "")} for one in far]
    text = main_table.sentence([*ELASTIC, *NULL, *far, *runs_of("ewc", "ewc", 0.3)])
    assert text.startswith("`elastic` loses least at equal learning: `ewc` loses 30.0 ± 7.5 points of the gain more")
    assert "Not compared, as they learn more at all rates: `lora`." in text


def test_a_null_is_set_beside_the_pull_of_its_strength():
    def other(runs):
        return [{**one, "name": _other(one["name"])} for one in runs]

    weaker = runs_of("null-one", "elastic-null", 0.4, rates=(1, 0.5), null="one", strength=20.0)
    directions = runs_of("null-directions", "elastic-null", 0.6, null="directions", strength=20.0)
    runs = [*ELASTIC, *NULL, *other(weaker), *runs_of("ewc", "ewc", 0.3)]
    assert f"{NULLS} with one strength for all 20.0 ± 5.0 at strength 5." in main_table.sentence([*runs, *directions])
    runs += [*other(runs_of("elastic", "elastic", 0.1, rates=(1, 0.5), strength=20.0)), *directions]
    text = main_table.sentence(runs)
    assert f"{NULLS} in random directions 50.0 ± 12.4 at strength 20, with one strength for all 20.0 ± 5.0 at" in text
    assert text.endswith("20.0 ± 5.0 at strength 5 and 30.0 ± 7.5 at strength 20.")
    assert text.startswith("`elastic` loses least at equal learning: `ewc`"), "the pull is no rival of itself"
    assert [row[0] for row in main_table.rows(runs)].count("elastic, other strength") == 1


def _other(name):
    """As a run of the strength that was not chosen is called."""
    row, _, seed = name.partition("-given-")
    row, _, factor = row.partition("@")
    return f"{row}@other-{factor or 1}-given-{seed}"


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
    assert ewc[3:5] == ["1", "1.00"] and ewc[-2:] == ["+9.0", "1.00"], "one seed is in no sentence"


def test_curves_that_cross_are_told():
    crosses = runs_of("ewc", "ewc", -0.1, rates=(0.5,)) + runs_of("ewc", "ewc", 0.3, rates=(1, 2))
    text = main_table.sentence([*ELASTIC, *NULL, *crosses])
    assert text.startswith("At equal learning `elastic` loses less than 1 of 1 rows: `ewc` loses")
    assert "Curves cross: where both have learned 0.71, `ewc` loses 10.0 ± 2.5 points less." in text


def test_a_row_with_one_rate_is_compared_there_and_by_the_seeds_that_both_have():
    runs = [*ELASTIC, *runs_of("ewc", "ewc", 0.3, rates=(1,))]
    rows = {row[0]: row for row in main_table.rows(runs)}
    assert rows["ewc"][-2:] == ["+30.0 ± 7.5", "1.01"]
    runs = [one for one in runs if one["name"] != "elastic@0.5-given-seed2" and one["name"] != "elastic-given-seed2"]
    rows = {row[0]: row for row in main_table.rows(runs)}
    assert rows["ewc"][-2].endswith("(2 seeds)")
