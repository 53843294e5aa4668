from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparse_cl
from sparse_cl.cli import main, run_command


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        line = json.dumps({"prompt": "p", "response": "r"}) + "\n"
        (folder / f"code.{split}.jsonl").write_text(line * 4)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "sgd"], "unknown method 'sgd'"),
        (["--lr", "fast"], "--lr fast: expected a number"),
        (["--lr", "adamw=1e-3,lora"], "expected a number, or METHOD=NUMBER"),
        (["--lr", "0"], "must be positive, got 0.0"),
        (
            ["--method", "adamw,lora", "--energy", "0.9"],
            "energy is set, but no method of this run takes it: adamw, lora",
        ),
        (["--energy", "1.5"], "energy: expected a share in (0, 1], got 1.5"),
        (["--domains", "law"], "domain 'law': no file"),
        (["--domains", "broken"], "broken.train.jsonl:2: not a line of JSON"),
        (["--domains", "code", "--model", "./nowhere"], "nowhere"),
        (["--domains", "code", "--reference", "absent.txt"], "--reference absent.txt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(data, tmp_path, capsys, arguments, message):
    for split in ("train", "test"):
        (data / f"broken.{split}.jsonl").write_text('{"prompt": "p", "response": "r"}\n{"prompt":\n')
    out = tmp_path / "out"
    assert main(["run", "--data", str(data), "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparse-cl: ")
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["run", "--steps", "0", "--out", "x"], ["fly"], ["run", "--source", "x", "--out", "x"]]
)
def test_wrong_options_print_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "--seed", "0,1"],
            "--seed 0,1: a run has one seed. For several runs, and means over them: `python",
        ),
        (["run", "--order", "given,reverse"], "--order given,reverse: a run has one order. For several runs"),
        (["compare", "here"], "compare: finished runs are compared by `python -m benchmarks.arena compare DIR …`"),
    ],
)
def test_what_moved_to_the_arena_says_so(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sparse-cl: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_package_without_the_arena_has_its_own_methods_and_says_where_the_others_are(tmp_path):
    (tmp_path / "sparse_cl").symlink_to(Path(sparse_cl.__file__).parent)
    code = (
        "import sys\n"
        "from sparse_cl.four_domains.settings import methods_named\n"
        "from sparse_cl.methods import METHODS\n"
        "from sparse_cl.cli import main\n"
        "assert 'benchmarks' not in sys.modules\n"
        "print(*METHODS)\n"
        "print(*methods_named(['all']))\n"
        "print(*methods_named(['baselines']))\n"
        "for method in ('bounds', 'ewc'):\n"
        "    assert main(['run', '--method', method, '--out', 'out']) == 2\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    methods, all_of_them, baselines = (line.split() for line in result.stdout.splitlines())
    assert methods == all_of_them and {"elastic", "two-four", *baselines} < {*methods}
    assert baselines == ["adamw", "lora", "replay-1", "replay-5"]
    bounds, ewc = result.stderr.splitlines()
    assert bounds.startswith("sparse-cl: bounds: there is no such method here (more baselines and the bounds are in ")
    assert "unknown method 'ewc'; there are adamw, lora" in ewc and "benchmarks/arena of a checkout" in ewc


def test_as_a_module_and_help_needs_no_transformers():
    code = (
        "import runpy, sys; sys.argv = ['sparse_cl', 'run', '--help']\n"
        "try: runpy.run_module('sparse_cl', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--reference FILE.txt" in result.stdout


def test_a_run_from_the_command_line(tiny_llama, tokenizer, data, tmp_path, capsys):
    tiny_llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["run", "--model", str(tmp_path / "model"), "--data", str(data), "--domains", "code"]
    arguments += ["--method", "adamw,sparse-masked", "--steps", "2", "--batch-size", "2", "--max-length", "32"]
    assert main([*arguments, "--lr", "adamw=1e-3,sparse-masked=1e-2", "--seed", "7", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "learning_accuracy" in captured.out
    assert "sparse-masked: learning code (1/1)" in captured.err, "a progress bar on all long work"
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [(run["method"], run["settings"]["lr"], run["seed"]) for run in runs] == [
        ("adamw", 1e-3, 7),
        ("sparse-masked", 1e-2, 7),
    ]
    assert "results.json, costs.json, comparison.txt, R.png, capacity.png, curves.png\n" in captured.out
    assert main([*arguments, "--out", str(out)]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_the_orthogonal_methods_take_their_settings_from_the_command_line(
    tiny_llama, tokenizer, data, tmp_path, capsys
):
    tiny_llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["run", "--model", str(tmp_path / "model"), "--data", str(data), "--domains", "code"]
    arguments += ["--method", "adamw,orthogonal", "--steps", "1", "--batch-size", "2", "--max-length", "32"]
    arguments += ["--energy", "1.0", "--source", "gradients", "--max-rank", "2"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert "capacity.png" in capsys.readouterr().out
    adamw, orthogonal = json.loads((out / "results.json").read_text())["runs"]
    assert adamw["settings"]["method"] == {}
    assert orthogonal["settings"]["method"] == {"energy": 1.0, "source": "gradients", "max_rank": 2}
    used = [layer["used"] for layer in orthogonal["domain_records"][0]["layers"].values()]
    assert max(used) == 2, "energy 1 takes all directions that there are, and a domain may add two"


def test_warnings_are_told_in_words_alone(tmp_path, capsys, monkeypatch):
    import warnings

    from sparse_cl.four_domains import experiment

    def run(settings, out, domains):
        warnings.warn("orthogonal: little survives", stacklevel=1)
        return []

    monkeypatch.setattr(experiment, "run", run)
    monkeypatch.setattr(experiment, "is_main_process", lambda: False)
    shown = warnings.showwarning
    assert main(["run", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.strip() == "Warning: orthogonal: little survives"
    assert warnings.showwarning is shown


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_command_promises_to_go_on_only_where_it_does(resumes, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    parser = argparse.ArgumentParser(prog="sparse-cl")
    parser.set_defaults(command=interrupted, resumes=resumes)
    assert run_command(parser, []) == 130
    assert ("goes on" in capsys.readouterr().err) == resumes


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_full_disk_is_said(capsys):
    def saves(_):
        torch.save(torch.zeros(100_000), "/dev/full")

    parser = argparse.ArgumentParser(prog="sparse-cl")
    parser.set_defaults(command=saves, resumes=True)
    assert run_command(parser, []) == 2
    assert "is the disk full?; the same command goes on" in capsys.readouterr().err
    parser.set_defaults(command=lambda _: [].pop())
    with pytest.raises(IndexError):
        run_command(parser, [])
