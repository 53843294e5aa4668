"""benchmarks/gpu_probes.py: what it computes from times, and a whole run at tiny shapes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("gpu_probes", FOLDER / "gpu_probes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_probes_are_compared_with_the_plain_pass_of_the_same_round(benchmark_module, monkeypatch):
    """A machine that gets slower: the ratio is 1.5 in every round, whatever the medians are."""
    clock = iter([99.0, 99.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0])

    def once_ms(call, device):
        call()
        return next(clock)

    calls = []
    monkeypatch.setattr(benchmark_module, "once_ms", once_ms)
    rows = benchmark_module.compare(lambda: calls.append("plain"), {"own": lambda: calls.append("own")}, 3, "cpu")
    assert calls[:8] == ["plain", "own"] * 4, "they take turns, and the first round warms up"
    assert (rows["plain"]["ms"], rows["own"]["ms"]) == (20.0, 30.0)
    assert (rows["own"]["ratio"], rows["own"]["ratio_least"], rows["own"]["ratio_most"]) == (1.5, 1.5, 1.5)
    assert rows["plain"]["ratio"] == 1.0


def test_a_tiny_run_reports_every_probe_and_says_whether_the_bar_is_met(
    benchmark_module, monkeypatch, tmp_path, capsys
):
    path = tmp_path / "probes.json"
    monkeypatch.setattr(sys, "argv", ["gpu_probes.py", "--tiny", "--out", str(path)])
    benchmark_module.main()
    results = json.loads(path.read_text())
    assert set(results["forward"]) > {"plain", "ActivationProbe", "FeatureProbe"}
    assert set(results["backward"]) == {"plain", "GradientProbe"}
    ratio = results["forward"]["ActivationProbe"]["ratio"]
    assert results["bar"] == {"ratio": ratio, "limit": 1.2, "met": ratio <= 1.2}
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.endswith("met" if ratio <= 1.2 else "missed"), "the last line is what gpu.sh shows of the phase"


def test_phases_end_within_nine_minutes():
    lines = (FOLDER / "gpu.sh").read_text().splitlines()
    limits = [int(line.split()[2]) for line in lines if line.startswith("phase ")]
    assert sum(limits) <= 540
