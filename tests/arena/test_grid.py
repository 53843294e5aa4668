"""Studies: what is run is what the points say, what is done is not run again, a table is made from the file alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from benchmarks.arena import ceiling, grid, main_study, size
from benchmarks.arena.__main__ import main
from sparse_cl.four_domains.folder import check_folder
from sparse_cl.four_domains.metrics import summarize
from sparse_cl.four_domains.results import write_runs
from sparse_cl.four_domains.settings import GIVEN, REVERSE, Settings
from sparse_cl.methods import METHODS

BASE = Settings(
    methods=("adamw",), domains=("a", "b"), model="/somewhere/m", data="/somewhere/d", metrics=("bits_per_byte",)
)
POINTS = {"x": {"method": "adamw", "lr": 1e-3}, "y": {"method": "elastic", "lr": 2e-3, "options": {"strength": 3.0}}}


def record(settings, R=((4.0, 3.0), (2.0, 3.0), (3.0, 1.0)), layers=None):
    summary = summarize([list(row) for row in R], lower_is_better=True)
    (method,) = settings.methods
    return {
        "method": method,
        "kind": "ours",
        "protects": False,
        "domains": list(settings.domains),
        "seed": settings.seed,
        "settings": {
            **settings.to_json(),
            "lr": settings.lr_of(method),
            "method": settings.make_method(method).settings(),
        },
        "R": {"bits_per_byte": [list(row) for row in R]},
        "R_reference": [None] * len(R),
        "drift": [None] * len(R),
        "summary": {**summary, "by_metric": {"bits_per_byte": summary}},
        "state_bytes": 1,
        "losses": [1.0] * 9,
        "domain_records": [{"domain": name, "layers": layers or {}} for name in settings.domains],
    }


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Runs that were made, instead of training; results are kept in tmp_path."""
    calls = []

    def run(settings, folder):
        calls.append(folder.name)
        check_folder(folder, settings)
        (folder / settings.methods[0] / "1-a").mkdir(parents=True)
        (folder / settings.methods[0] / "a-file").touch()
        if not (folder / "base.json").exists():
            (folder / "base.json").write_text(json.dumps(folder.name))
            (folder / "inputs.json").write_text("{}")
        write_runs(folder, [record(settings)])

    monkeypatch.setattr(grid.experiment, "run", run)
    monkeypatch.setattr(grid, "KEPT", tmp_path / "kept")
    return calls


def test_every_point_order_and_seed_is_run_once_in_parts(made, tmp_path):
    study = grid.over(BASE, (GIVEN, REVERSE), (0, 1), POINTS)
    assert study["y-reverse-seed1"].domains == ("b", "a") and study["y-reverse-seed1"].seed == 1
    assert study["y-given-seed0"].make_method("elastic").strength == 3.0 and study["y-given-seed0"].lr == {
        "elastic": 2e-3
    }
    for part in (0, 1):
        grid.run("some", study, tmp_path, part, 2)
    assert sorted(made) == sorted(study)
    assert [run["name"] for run in grid.run("some", study, tmp_path)] == list(study)
    assert len(made) == len(study) == 8
    assert not list(tmp_path.glob("*/*/1-a")), "weights of finished runs are deleted"


def test_the_base_model_is_scored_once_for_runs_that_score_the_same(made, tmp_path):
    longer = {f"long-{name}": replace(s, steps=99) for name, s in grid.over(BASE, (GIVEN,), (0,), POINTS).items()}
    study = grid.over(BASE, (GIVEN, REVERSE), (0, 1), POINTS) | longer
    grid.run("some", study, tmp_path)
    scored = {name: json.loads((tmp_path / name / "base.json").read_text()) for name in study}
    assert scored == {name: f"x-{'reverse' if 'reverse' in name else 'given'}-seed0" for name in study}
    grid.run("more", {"other": replace(study["x-given-seed0"], eval_records=7)}, tmp_path)
    assert json.loads((tmp_path / "other" / "base.json").read_text()) == "other"


def test_the_base_model_is_scored_for_each_seed_that_draws_data_of_its_own(made, tmp_path):
    study = grid.over(Settings(steps=1), (GIVEN,), (0, 1), POINTS)
    grid.run("some", study, tmp_path)
    scored = {name: json.loads((tmp_path / name / "base.json").read_text()) for name in study}
    assert scored == {name: f"x-given-seed{name[-1]}" for name in study}


def test_what_is_kept_names_files_and_not_where_they_were(made, tmp_path):
    study = grid.over(BASE, (GIVEN,), (0,), POINTS)
    (run,) = grid.run("some", study, tmp_path, 0, 2)
    assert grid.kept("some") == json.loads(json.dumps([run]))
    assert "somewhere" not in (tmp_path / "kept" / "some.json").read_text() and run["settings"]["model"] == "m"
    assert "losses" not in run and "layers" not in run["domain_records"][0]
    with pytest.raises(ValueError, match="no results of 'other' are kept"):
        grid.kept("other")


def test_what_is_kept_is_not_run_again_on_another_machine_but_with_other_settings(made, tmp_path):
    study = grid.over(BASE, (GIVEN,), (0,), POINTS)
    grid.run("some", study, tmp_path / "here", 0, 2)
    moved = {name: replace(settings, model="/elsewhere/m") for name, settings in study.items()}
    found = grid.run("some", moved, tmp_path / "there")
    assert made == ["x", "y"] and [run["name"] for run in found] == ["x", "y"]
    longer = {name: replace(settings, steps=settings.steps + 1) for name, settings in study.items()}
    with pytest.warns(UserWarning, match=r"some.json: x, y had other settings"):
        grid.run("some", longer, tmp_path / "longer", 1, 2)
    assert made == ["x", "y", "y"] and [run["name"] for run in grid.kept("some")] == ["y"]


def test_what_failed_is_run_again_and_another_default_is_another_setting(made, monkeypatch, tmp_path):
    study = grid.over(BASE, (GIVEN,), (0,), POINTS)
    grid.run("some", study, tmp_path / "here")
    runs = grid.kept("some")
    runs[0]["failed"] = "OutOfMemoryError"
    runs[1]["settings"]["method"]["row_strength"] = 7.0
    (tmp_path / "kept" / "some.json").write_text(json.dumps({"runs": runs}))
    with pytest.warns(UserWarning, match=r"some.json: y had other settings"):
        grid.run("some", study, tmp_path / "there")
    assert made == ["x", "y", "x", "y"]


def test_the_table_is_made_from_the_file_alone(made, monkeypatch, tmp_path, capsys):
    study = grid.over(BASE, (GIVEN, REVERSE), (0, 1), POINTS)
    study |= {f"long-{name}": replace(settings, steps=99) for name, settings in study.items()}
    grid.run("routed", study, tmp_path)
    assert main(["table", "routed"]) == 0
    assert "elastic" in (shown := capsys.readouterr().out) and "all orders" in shown
    assert shown.index("2 domains, 150 steps each, m") < shown.index("2 domains, 99 steps each, m")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nothing"], "unknown study 'nothing'; there are demo"),
        (["run", "routed", "--part", "3/2"], "--part: expected I/N with 1 <= I <= N, got 3/2"),
        (["run", "routed", "--part", "half"], "got half"),
        (["run", "routed", "--data", "absent"], "no such folder"),
        (["table", "nothing"], "no results of 'nothing' are kept"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, said, made, tmp_path, capsys):
    if arguments[0] == "run":
        others = {"--models": tmp_path, "--data": tmp_path, "--out": tmp_path / "out"}
        for name, value in others.items():
            arguments = arguments if name in arguments else [*arguments, name, str(value)]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err and not made


def test_forecasts_are_judged_by_what_was_learned():
    names = ("a", "b", "c")
    base = Settings(methods=("adamw",), domains=names)
    alone = ((4.0, 4.0, 4.0), (2.0, 9.0, 9.0), (9.0, 2.0, 9.0), (9.0, 9.0, 3.0))
    R = ((4.0, 4.0, 4.0), (2.0, 4.0, 4.0), (3.0, 3.0, 4.0), (3.0, 3.0, 3.5))
    room = {"l": {"width": 10, "free": 5, "used": 5, "surviving": 0.5, "leak": None}}
    run, single = record(base, R, room), record(base, alone)
    for entry in run["domain_records"]:
        entry["room"] = grid._room(entry["layers"])
    assert ceiling.shares(run, single) == ([1.0, 0.5, 0.5], [2.0, 2.0, 1.0])
    assert ceiling.forecasts(run, [1.0, 0.5, 0.5], [2.0, 2.0, 1.0]) == {
        "all of it": [1.0, 1.0], "as the last": [1.0, 0.5], "as those before": [1.0, 0.75],
        "C": [0.5, 0.5], "B": [0.5, 0.5], "C·B": [0.25, 0.25],
    }  # fmt: skip
    found = {name: one["error"] for name, one in ceiling.judged(run, single).items()}
    before = {"all of it": 0.75, "as the last": 0.5, "as those before": 0.625}
    assert found == {**before, "C": 0.0, "B": 0.0, "C·B": 0.375}


def test_every_method_has_six_settings_to_be_tuned_by_and_the_best_is_tested():
    names = main_study.tuning_points()
    assert len(names) == 6 * len(main_study.ENTRIES)
    assert set(METHODS) == {method for method, *_ in main_study.ENTRIES.values()}
    assert not set(main_study.TUNING) & set(main_study.TESTING)
    for point in names.values():
        METHODS[point["method"]](**point["options"])
    for entry in main_study.ENTRIES:
        assert len({(s["lr"], str(s["options"])) for s in main_study.settings_of(entry)}) == 6
    runs = [{"name": f"{row}.{i}", "summary": {"acc": abs(i - 4)}} for row in ("elastic", "null-one") for i in range(6)]
    runs += [{"name": f"adamw.{i}", "summary": {"acc": i}} for i in range(5)]
    chosen = main_study.chosen(runs)
    assert chosen == {
        "elastic": {"method": "elastic", "lr": 3e-3, "options": {}},
        "null-one": {"method": "elastic-null", "lr": 3e-3, "options": {"null": "one"}},
    }, "a row that is not tuned whole is not tested"
    joint = {"method": "joint", "lr": 3e-3, "options": {}}
    adamw = {"method": "adamw", "lr": 1e-3}
    rates = {k: point["lr"] for k, point in main_study.curves({**chosen, "joint": joint, "adamw": adamw}).items()}
    of_elastic = {"elastic@0.5": 1.5e-3, "elastic@0.25": 7.5e-4, "elastic@0.125": 3.75e-4}
    assert rates == {**of_elastic, "null-one@0.5": 1.5e-3, "adamw@2": 2e-3}
    ewc = {"method": "ewc", "lr": 3e-4, "options": {"ewc_lambda": 1000.0}}
    beyond = main_study.further({**chosen, "ewc": ewc, "joint": joint})
    assert {(name, point["lr"], *point["options"].values()) for name, point in beyond.items() if "ewc" in name} == {
        ("ewc.rate", 1e-4, 1000.0),
        ("ewc.ewc_lambda-10000", 3e-4, 1e4),
        ("ewc.ewc_lambda-3000", 3e-4, 3e3),
    }
    assert {name.partition(".")[0] for name in beyond} == {"ewc", "null-one"}, "ours and bounds are not tried further"
    runs[4] = {"name": "elastic.4", "failed": "it did"}
    assert main_study.chosen(runs)["elastic"] == {"method": "elastic", "lr": 1e-3, "options": {"strength": 5.0}}


def test_models_are_compared_where_they_learned_the_same_share_of_their_best(tmp_path):
    def run(model, seed, lr, learned, lost):
        settings = {"model": model, "lr": lr}
        summary = {"learned": learned, "gain_lost": lost}
        return {"method": "adamw", "domains": ["a"], "seed": seed, "settings": settings, "summary": summary}

    runs, sizes = [], {"base-5m": 5_000_000}
    for width in (1, 2, 4):
        for seed in (0, 1):
            model = f"pretrained-{width}-{seed}"
            sizes[model] = 1_000_000 * width**2
            # At 1e-3 it has learned .8 and at 1e-2 all: .9 lies half way; at 1e-1 it learns less.
            loses = 0.4 * sizes[model] ** -0.25
            runs += [run(model, seed, 1e-3, 0.8, loses), run(model, seed, 1e-2, 1.0, 3 * loses)]
            runs += [run(model, seed, 1e-1, 0.9, 9.0), run(model, seed, 1e-4, 0.1, 0.0)]
    runs += [run("base-5m", 0, 1e-3, 1.0, 0.5), run("base-5m", 0, 1e-2, 0.8, 0.6), run("other", 0, 1e-3, 1.0, 0.5)]
    found = size.points(runs, sizes)
    assert len(found) == 6, "no rate of base-5m's learns less than nine tenths of its best, before that"
    for point in found:
        assert point.rate == pytest.approx(10**-2.5) and point.learned == pytest.approx(0.9)
        assert point.lost == pytest.approx(0.8 * point.parameters**-0.25)
    assert size.matched([]) is None and size.matched([run("m", 0, 1e-3, -0.1, 0.0), run("m", 0, 1e-2, -0.2, 0)]) is None
    slope, error = size.exponent(found)
    assert slope == pytest.approx(-0.25) and error == pytest.approx(0, abs=1e-6)
    said = size.sentence(found)
    assert "90 % of its best, the share lost falls with the size: it goes as parameters^(−0.25 ± 0.00)." in said
    assert size.table(found).endswith(said)
    assert size.rows(found)[0][:4] == ["width 1", "1 M", "2", "3.2e-03"]
    size.draw(found, tmp_path / "size.png")
    assert (tmp_path / "size.png").read_bytes().startswith(b"\x89PNG")
