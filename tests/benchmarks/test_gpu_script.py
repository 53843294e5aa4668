"""benchmarks/gpu.sh: a whole dry run, and by stubs what it does where something fails or time does not reach."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PHASES = ["build", "tests", "sanitizer", "bandwidth", "steps", "projector", "probes"]
#: What there is none of yet, or no CPU can measure.
UNMEASURED = ("peak",) if find_spec("sparse_cl.optim.low_rank_pull") else ("peak", "pulled")


@pytest.fixture
def modules(monkeypatch, tmp_path):
    for name, value in {"OUT": str(tmp_path / "out"), "COMMIT": "abc", "SECONDS_LIMIT": "", "PHASES": ""}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "out").mkdir()
    return lambda name: importlib.import_module(f"benchmarks.gpu.{name}")


@pytest.fixture
def phases(modules):
    return modules("phases")


@pytest.fixture
def stubs(phases, monkeypatch):
    """Phases of one case each; the names of the phases and cases that ran."""
    ran = []

    def runner(run, end, dry):
        ran.append(run.phase)
        run.case("one", lambda: ran.append(f"{run.phase}: one") or {"ms": 1.0})
        return run.finish()

    monkeypatch.setattr(phases, "RUNNERS", dict.fromkeys(PHASES, runner))
    return ran


def result(path: Path) -> dict:
    return json.loads((path / "out" / "gpu.json").read_text())


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("dry") / "out"
    environment = {**os.environ, "OUT": str(folder), "PYTHON": sys.executable, "COMMIT": "abc", "PHASES": ""}
    command = ["bash", BENCHMARKS / "gpu.sh", "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, folder


def test_a_dry_run_goes_through_every_phase_and_leaves_two_files(dry_run):
    done, folder = dry_run
    assert done.returncode == 0, done.stdout[-4000:]
    assert {file.name for file in folder.iterdir()} == {"gpu.log", "gpu.json"}
    data = json.loads((folder / "gpu.json").read_text())
    assert [(p["name"], p["status"]) for p in data["phases"]] == [(name, "passed") for name in PHASES]
    assert data["versions"].keys() == {"device", "driver", "torch", "cuda", "commit", "python"}
    assert data["not_reached"] == []
    for name in PHASES:
        for case in data[name].values():
            assert case["status"] in ("passed", "skipped") and case["commit"] == "abc" and case["device"]


def test_a_dry_run_measures_all_that_has_a_bar(dry_run):
    done, folder = dry_run
    bars = json.loads((folder / "gpu.json").read_text())["bars"]
    unmeasured = [bar["what"] for bar in bars if bar["figure"] is None]
    assert all(any(word in what for word in UNMEASURED) for what in unmeasured), unmeasured
    table = done.stdout[done.stdout.index("DRY RUN") :]
    assert len(table) < 10_000 and all(bar["what"] in table for bar in bars)
    assert (folder / "gpu.log").read_text() == done.stdout


def test_active_layers_and_adapters_train_equal_budgets(dry_run):
    steps = json.loads((dry_run[1] / "gpu.json").read_text())["steps"]
    trained = {name.removeprefix("active, 1 B: "): case.get("trained") for name, case in steps.items()}
    # Two of 40 neurons in two layers, with three vectors of 16; LoRA at the next rank of 56 a matrix.
    assert trained["active 5 %"] == 2 * 2 * 3 * 16
    assert trained["LoRA, fp32 adapters"] == trained["LoRA, bf16 adapters"] == 2 * 3 * (16 + 40)


def test_what_passed_is_not_run_again(phases, stubs, tmp_path, monkeypatch):
    assert phases.main(["--dry-run"]) == 0
    file = tmp_path / "out" / "gpu.json"
    stubs.clear()
    assert phases.main(["--dry-run", "--resume", str(file)]) == 0
    assert stubs == ["build"]
    first = result(tmp_path)
    stubs.clear()
    monkeypatch.setenv("COMMIT", "def")
    assert phases.main(["--dry-run", "--resume", str(file)]) == 0
    assert stubs == PHASES, "another commit may have cases of its own; those that are there are kept"
    assert result(tmp_path)["steps"] == first["steps"] and first["steps"]["one"]["commit"] == "abc"


def test_the_phases_that_are_named_join_the_earlier_ones(phases, stubs, tmp_path, monkeypatch):
    monkeypatch.setenv("PHASES", "steps")
    assert phases.main(["--dry-run"]) == 0
    assert [s for s in stubs if ":" not in s] == ["build", "steps"]
    monkeypatch.setenv("PHASES", "tests")
    assert phases.main(["--dry-run", "--resume", str(tmp_path / "out" / "gpu.json")]) == 0
    assert {"steps", "tests"} < result(tmp_path).keys()
    with pytest.raises(SystemExit):
        phases.main(["--resume", str(tmp_path / "out" / "gpu.json")])


def test_without_time_all_is_named_as_not_reached(phases, stubs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SECONDS_LIMIT", "0")
    assert phases.main([]) == 3
    assert stubs == []
    data = result(tmp_path)
    assert {p["status"] for p in data["phases"]} == {"skipped-by-budget"}
    assert [name.split(":")[0] for name in data["not_reached"]] == PHASES
    said = capsys.readouterr().out
    assert all(f"not reached: {name}" in said for name in PHASES)


def test_a_phase_names_the_cases_that_time_did_not_reach(modules, tmp_path):
    run = modules("run").Run("steps", tmp_path / "x.json", time.time() + 60)
    assert run.case("short", lambda: {"ms": 1.0})["status"] == "passed"
    assert run.case("long", lambda: {"ms": 1.0}, needs=100) is None
    assert run.finish() == 3
    assert json.loads((tmp_path / "x.json").read_text())["not_reached"] == ["steps: long"]


def test_a_failed_case_is_recorded_and_the_next_runs(modules, tmp_path):
    module = modules("run")
    run = module.Run("steps", tmp_path / "x.json")

    def fails():
        raise ValueError("too large")

    def stopped():
        raise KeyboardInterrupt

    run.case("bad", fails)
    run.case("good", lambda: {"ms": 1.0}, layers=3)
    assert run.finish() == module.FAILED
    with pytest.raises(KeyboardInterrupt):
        run.case("last", stopped)
    kept = module.Run("steps", tmp_path / "x.json")
    assert kept.cases["bad"]["error"] == "ValueError: too large"
    assert kept.case("bad", lambda: {"ms": 2.0})["ms"] == 2.0, "what failed runs again"
    assert kept.case("good", fails, layers=3)["ms"] == 1.0
    assert kept.case("good", lambda: {"ms": 2.0}, layers=4)["ms"] == 2.0, "another size is another case"


def test_a_failed_phase_does_not_stop_the_later_ones(phases, stubs, tmp_path, monkeypatch):
    def fails(run, end, dry):
        raise OSError("no such tool")

    monkeypatch.setitem(phases.RUNNERS, "tests", fails)
    assert phases.main([]) == 1
    assert stubs[-1] == "probes: one"
    entry = next(p for p in result(tmp_path)["phases"] if p["name"] == "tests")
    assert (entry["status"], entry["error"]) == ("failed", "OSError: no such tool")


def test_a_failed_build_stops(phases, stubs, tmp_path, monkeypatch):
    monkeypatch.setitem(phases.RUNNERS, "build", phases.build)
    monkeypatch.setattr(phases, "execute", lambda *command, **options: (1, "nvcc fatal: no"))
    assert phases.main([]) == 1
    assert stubs == []
    data = result(tmp_path)
    assert [p["name"] for p in data["phases"]] == ["build"]
    assert "nvcc fatal" in data["build"]["libraries"]["error"]


@pytest.mark.parametrize("dry", [False, True])
def test_skipped_tests_count_as_failed_but_in_a_dry_run(phases, dry, tmp_path):
    skipped, mixed = tmp_path / "test_skipped_cuda.py", tmp_path / "test_mixed_cuda.py"
    skipped.write_text("import pytest\n@pytest.mark.skip(reason='needs a GPU')\ndef test_one(): pass\n")
    mixed.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'differs'\n")
    found = phases.run_tests([skipped, mixed], time.time() + 100, dry)
    assert found[mixed.name] == {
        "passed": 1,
        "skipped": 0,
        "failed": 1,
        "status": "failed",
        "failures": {"test_bad": found[mixed.name]["failures"]["test_bad"]},
    }
    assert "differs" in found[mixed.name]["failures"]["test_bad"]
    if dry:
        assert found[skipped.name] == {"passed": 0, "skipped": 1, "failed": 0}
    else:
        assert found[skipped.name]["status"] == "failed" and "needs a GPU" in found[skipped.name]["error"]


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (0, "checked 3 problems\n===== ERROR SUMMARY: 0 errors\n", "passed"),
        (9, "checked 3 problems\n===== ERROR SUMMARY: 2 errors\n", "failed"),
        (0, "checked 3 problems\n", "failed"),
        (124, "", "failed"),
    ],
)
def test_the_sanitizer_must_say_that_it_watched(phases, tmp_path, monkeypatch, code, output, status):
    monkeypatch.setattr(phases, "execute", lambda *command, **options: (code, output))
    run = phases.Run("sanitizer", tmp_path / "x.json")
    phases.sanitizer(run, time.time() + 100, False)
    assert {case["status"] for case in run.cases.values()} == {status}


def test_a_ratio_is_of_one_device_and_size(modules):
    case = {"status": "passed", "device": "H100", "layers": 4, "tokens": 8, "step_ms": 2.0}
    results = modules("table").Results(
        {"steps": {"a": case, "b": case | {"step_ms": 4.0}, "c": case | {"device": "H200"}, "d": case | {"layers": 5}}}
    )
    assert [results.ratio("a", other) for other in "bcde"] == [0.5, None, None, None]


def test_probes_are_compared_with_the_plain_pass_of_the_same_round(modules, monkeypatch):
    """A machine that gets slower: the ratio is 1.5 in every round, whatever the medians are."""
    probes = modules("probes")
    clock = iter([99.0, 99.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0])

    def once_ms(call):
        call()
        return next(clock)

    calls = []
    monkeypatch.setattr(probes, "once_ms", once_ms)
    monkeypatch.setattr(probes, "peak_gib", lambda call: None)
    rows = probes.compare(lambda: calls.append("plain"), {"own": lambda: calls.append("own")}, 3)
    assert calls == ["plain", "own"] * 4, "they take turns, and the first round warms up"
    assert (rows["plain"]["ms"], rows["own"]["ms"]) == (20.0, 30.0)
    assert (rows["own"]["ratio"], rows["own"]["ratio_least"], rows["own"]["ratio_most"]) == (1.5, 1.5, 1.5)
    assert rows["plain"]["ratio"] == 1.0
