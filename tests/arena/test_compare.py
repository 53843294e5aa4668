"""Many runs in one table, from results.json files that are made by hand."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from cases.runs import run

from benchmarks.arena.__main__ import main
from benchmarks.arena.compare import TOGETHER, gather
from benchmarks.arena.compare_report import compare
from benchmarks.arena.intervals import interval
from benchmarks.arena.pareto import lines_of
from benchmarks.arena.sweep import runs_of
from sparse_cl.four_domains import experiment
from sparse_cl.four_domains.results import add_intransigence, read_runs, write_runs
from sparse_cl.four_domains.settings import Settings
from sparse_cl.four_domains.verdict import Outcome, verdict


def write(folder, *runs):
    folder.mkdir(parents=True)
    write_runs(folder, runs)
    return folder


def test_an_interval_is_mean_and_t_times_standard_error():
    found = interval([1.0, 2.0, None, 6.0])
    assert (found.mean, found.count) == (3.0, 3)
    assert found.half_width == pytest.approx(4.302652730 * statistics.stdev([1, 2, 6]) / math.sqrt(3))
    assert interval([5.0]).half_width is None
    assert interval([None]) is None


def test_seeds_are_averaged_orders_apart_and_together(tmp_path):
    forgotten = {("a", "b"): (0.2, 0.4, 0.9), ("b", "a"): (0.1, 0.3)}
    for domains, values in forgotten.items():
        for seed, value in enumerate(values):
            R = ((4.0, 3.0), (2.0, 3.0), (2.0 + value, 1.0))
            write(tmp_path / f"{domains[0]}{seed}", run(seed=seed, R=R, domains=domains))
    compared = gather([tmp_path])
    (row,) = compared.rows
    assert compared.sections() == ["a → b", "b → a", TOGETHER]
    apart = compared.get(row, "a → b", "forgetting")
    assert (apart.mean, apart.count) == (pytest.approx(0.5), 3)
    together = compared.get(row, TOGETHER, "forgetting")
    assert (together.mean, together.count) == (pytest.approx((0.15 + 0.35) / 2), 2), "the third seed has one order"
    half = 12.706204736 * statistics.stdev([0.15, 0.35]) / math.sqrt(2)
    assert together.half_width == pytest.approx(half)
    assert compared.get(row, "a → b", "reference_change").mean == pytest.approx(0.25)
    assert compared.get(row, "a → b", "drift").mean == pytest.approx(0.2)
    assert compared.get(row, "a → b", "step_seconds").mean == pytest.approx(0.01)


def test_rows_of_one_method_are_called_by_what_differs(tmp_path):
    write(tmp_path / "1", run(lr=1e-3), run("orthogonal", own={"energy": 0.9, "source": "inputs"}))
    write(tmp_path / "2", run(lr=3e-3), run("orthogonal", own={"energy": 0.95, "source": "inputs"}))
    write(tmp_path / "3", run("lora"))
    rows = gather([tmp_path]).rows
    names = [row.name for row in rows]
    assert names == ["adamw lr=0.001", "orthogonal energy=0.9", "adamw lr=0.003", "orthogonal energy=0.95", "lora"]
    lines = [[row.name for row in line] for line in lines_of(rows)]
    assert lines[0] == ["adamw lr=0.001", "adamw lr=0.003"], "a line goes through the learning rates"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"steps": 11}, "steps: 10 there, 11 now"),
        ({"model": "n"}, 'model: "m" there, "n" now'),
        ({"split": "validation"}, 'split: "test" there, "validation" now'),
        ({"domains": ("a", "c")}, "domains"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, other, message):
    write(tmp_path / "1", run())
    write(tmp_path / "2", run(**other))
    with pytest.raises(ValueError, match=f"cannot be compared .* they differ in .*{message}"):
        gather([tmp_path])


def test_a_run_that_is_there_twice_counts_once(tmp_path):
    one = write(tmp_path / "1", run())
    assert len(gather([tmp_path, one]).rows[0].runs) == 1
    write(tmp_path / "2", run())
    with pytest.warns(UserWarning, match="was found before; it is left out"):
        assert gather([tmp_path]).get(gather([tmp_path]).rows[0], "a → b", "acc").count == 1


def test_folders_without_runs(tmp_path):
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "results.json").write_text('{"models": []}')
    with pytest.raises(ValueError, match=r"no results\.json of sparse-cl run"):
        gather([tmp_path])
    (tmp_path / "probes" / "results.json").write_text('{"runs": [')
    with pytest.raises(ValueError, match=r"results\.json: cannot be read"):
        gather([tmp_path])


def test_intransigence_is_against_the_best_setting_of_the_bound(tmp_path):
    alone = ((4.0, 3.0), (1.5, 3.0), (4.0, 0.5))
    runs = [run(), run("single", lr=1e-3, R=((4.0, 3.0), (3.0, 3.0), (4.0, 2.0)))]
    write(tmp_path / "1", *runs)
    write(tmp_path / "2", run("single", lr=3e-3, R=alone))
    compared = gather([tmp_path])
    assert compared.get(compared.rows[0], "a → b", "intransigence").mean == pytest.approx(0.5)
    add_intransigence(runs)
    assert runs[0]["summary"]["intransigence"] == pytest.approx(-1.0), "within one run, against its own bound"
    assert runs[0]["summary"]["by_metric"]["bits_per_byte"]["intransigence"] == pytest.approx(-1.0)


def test_costs_stand_beside_the_results_and_old_files_have_them_inside(tmp_path):
    write(tmp_path / "1", run())
    kept = json.loads((tmp_path / "1" / "results.json").read_text())["runs"][0]
    assert not {"seconds", "step_seconds", "peak_memory_bytes"} & kept.keys()
    assert read_runs(tmp_path / "1") == [run()]
    (tmp_path / "1" / "costs.json").unlink()
    assert read_runs(tmp_path / "1")[0]["seconds"] is None
    (tmp_path / "1" / "results.json").write_text(json.dumps({"runs": [run()]}))
    assert read_runs(tmp_path / "1") == [run()]


def test_the_command_writes_table_numbers_and_picture(tmp_path, capsys):
    failed = {
        **{key: run("lora")[key] for key in ("method", "kind", "domains", "seed", "settings")},
        "failed": "Why: so",
    }
    for seed in (0, 1):
        better = ((4.0, 3.0), (2.0, 3.0), (2.0 + seed / 10, 1.0))
        write(tmp_path / f"{seed}", run(seed=seed), run("orthogonal", seed=seed, R=better), {**failed, "seed": seed})
    assert main(["compare", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("lora FAILED in ")
    assert lines[2].startswith(
        "orthogonal forgot least of the methods that learned at least 95% of adamw's gain: 0.050"
    )
    text = (tmp_path / "compare.txt").read_text()
    assert "orthogonal" in text and "0.050 ±0.635" in text
    found = json.loads((tmp_path / "compare.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["adamw", "orthogonal"]
    number = found["rows"][1]["scores"]["a → b"]["bits_per_byte"]["forgetting"]
    assert number == {"mean": pytest.approx(0.05), "half_width": pytest.approx(12.706204736 * 0.05), "count": 2}
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert compare([tmp_path], tmp_path / "again") + "\n" == (tmp_path / "again" / "compare.txt").read_text()
    assert main(["compare", str(tmp_path / "nowhere")]) == 2


def outcome(name, learned, forgetting, kind="ours", step=1.0):
    costs = {"step_seconds": step, "peak_memory_bytes": 10.0, "state_bytes": None}
    return Outcome(name, name.split()[0], kind, learned, forgetting, None, costs)


ADAMW = outcome("adamw", 2.0, 1.0, "baseline", 2.0)


def test_the_verdict_names_the_least_forgetting_of_those_that_learned():
    rows = [
        ADAMW,
        outcome("replay-5", 1.95, 0.1, "baseline"),
        outcome("orthogonal", 1.9, 0.2),
        outcome("idle", 0.1, 0.0),
    ]
    rows += [outcome("lora", 1.5, 0.5, "baseline", 4.0), outcome("joint", 2.5, 0.0, "bound")]
    first, ours, cost = verdict(rows)
    assert first.startswith("replay-5 forgot least of the methods that learned at least 95% of adamw's gain: 0.100")
    assert "having learned 98%; adamw forgot 1.000" in first
    assert ours.startswith("Of ours, orthogonal forgot least: 0.200")
    expected = "time of a step 0.50 times adamw's and 0.25 times lora's; peak memory 1.00 times adamw's and 1.00"
    assert cost == f"What replay-5 costs: {expected} times lora's."


def test_the_verdict_when_none_learned_enough_or_nothing_can_be_said():
    first, second, _ = verdict([ADAMW, outcome("slow", 1.8, 0.3), outcome("idle", 0.1, 0.0)])
    assert first.startswith("No method but adamw learned at least 95% of adamw's gain. slow came nearest with 90%")
    assert second.startswith("idle forgot least, 0.000 bits/byte, with 5% of that gain")
    assert verdict([outcome("one", 1.0, 0.2)])[0].startswith("one forgot least: 0.200 bits/byte. How much it should")
    assert verdict([ADAMW]) == ["adamw alone was run: it forgot 1.000 bits/byte."]
    assert verdict([outcome("one", 1.0, None)]) == []
    best = verdict([outcome("adamw lr=1", 1.0, 0.1, "baseline"), ADAMW, outcome("own", 1.95, 0.5)])[0]
    assert best.startswith("own forgot least"), "the yardstick is the learning rate with which adamw learned most"


def test_the_sweep_takes_the_options_of_a_run_with_several_orders_and_seeds(tmp_path, monkeypatch, capsys):
    made = {}
    monkeypatch.setattr(experiment, "run", lambda settings, out: made.update({out.name: settings}) or [])
    monkeypatch.setattr(experiment, "is_main_process", lambda: False)
    arguments = [
        "sweep",
        "--domains",
        "code,math",
        "--order",
        "given,reverse",
        "--seed",
        "0,3",
        "--method",
        "adamw,lora",
    ]
    assert main([*arguments, "--lr", "1e-3", "--steps", "7", "--out", str(tmp_path)]) == 0
    assert list(made) == ["given-seed0", "given-seed3", "reverse-seed0", "reverse-seed3"]
    last = made["reverse-seed3"]
    assert (last.domains, last.seed, last.steps) == (("math", "code"), 3, 7)
    assert last.lr == {"adamw": 1e-3, "lora": 1e-3} and last.methods == ("adamw", "lora")
    assert main([*arguments[:-1], "sgd", "--out", str(tmp_path)]) == 2
    assert "python -m benchmarks.arena: unknown method 'sgd'" in capsys.readouterr().err


def test_orders_and_seeds_make_a_folder_each(tmp_path):
    settings = Settings(domains=("code", "math=org/set:en", "general"), methods=("adamw",))
    assert settings.arranged("reverse", 0).domains == ("general", "math=org/set:en", "code")
    runs = runs_of(settings, ("given", "math+code+general"), (0, 3), tmp_path)
    names = ["given-seed0", "given-seed3", "math+code+general-seed0", "math+code+general-seed3"]
    assert [folder.name for folder in runs] == names
    last = runs[tmp_path / names[3]]
    assert (last.seed, last.domains) == (3, ("math=org/set:en", "code", "general"))
    assert list(runs_of(settings, ("reverse",), (2,), tmp_path)) == [tmp_path]
    with pytest.raises(ValueError, match=r"--order code\+law: expected given, reverse, or all of code\+math\+general"):
        runs_of(settings, ("code+law",), (0,), tmp_path)
    with pytest.raises(ValueError, match="each once; got 1, 1"):
        runs_of(settings, ("given",), (1, 1), tmp_path)
    with pytest.raises(ValueError, match="the same order"):
        runs_of(settings, ("given", "code+math+general"), (0,), tmp_path)
