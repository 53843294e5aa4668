"""benchmarks/gpu_active_linear.py: a whole run at tiny shapes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_a_tiny_run_compares_at_equal_budgets_and_ends_with_its_bars(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("gpu_active_linear", FOLDER / "gpu_active_linear.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = tmp_path / "active.json"
    monkeypatch.setattr(sys, "argv", ["gpu_active_linear.py", "--tiny", "--repeats", "1", "--out", str(path)])
    module.main()
    result = json.loads(path.read_text())["shapes"]["tiny"]
    trained = {name: row["trained"] for name, row in result["contenders"].items()}
    # Two of 40 neurons in two layers, with three vectors of 16; LoRA at the next rank of 56 a matrix.
    assert trained["ours"] == 2 * 2 * 3 * 16
    assert trained["LoRA"] == trained["SHiRA"] == 2 * 3 * (16 + 40)
    assert result["ratios"].keys() == module.BARS.keys()
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.startswith("tiny: time / full AdamW"), "the last line is what gpu.sh shows of the phase"
