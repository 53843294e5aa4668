"""`sparse-cl run --probe`: reports on the base, each method's model, and the drift between them."""

import json
from statistics import mean

import pytest

from sparse_cl.cli import main
from sparse_cl.models.loading import load_model
from sparse_cl.probes.rank import update_rank
from sparse_cl.report.checkpoints import load_checkpoint

METHODS = ("adamw", "orthogonal-lora")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for domain, word in (("code", "def"), ("math", "two")):
        for split in ("train", "test"):
            records = [{"prompt": f"{word} {i % 7}", "response": f"{word} {i % 5} plus {i % 3}"} for i in range(40)]
            (folder / f"{domain}.{split}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


@pytest.mark.usefixtures("no_pictures")
def test_reports_around_a_run_which_go_on_where_they_stopped(tiny_llama, tokenizer, data, tmp_path, capsys):
    base, out = tmp_path / "model", tmp_path / "out"
    tiny_llama.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "text.txt").write_text("What is one plus two? The answer is three. " * 20)
    arguments = ["run", "--model", str(base), "--data", str(data), "--domains", "code,math", "--steps", "3"]
    arguments += ["--method", ",".join(METHODS), "--batch-size", "4", "--max-length", "32", "--eval-records", "4"]
    arguments += ["--reference", str(tmp_path / "text.txt"), "--lr", "0.01", "--out", str(out), "--probe"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    folders = ["base", *METHODS, *(f"{method}-drift" for method in METHODS)]
    assert {path.name for path in (out / "probes").iterdir()} == {*folders, "comparison.txt"}
    table = (out / "probes" / "comparison.txt").read_text()
    assert table in told and f"Written to {out / 'probes'}" in told
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[2:5]}
    assert list(rows) == ["base", *METHODS] and rows["base"][5:] == ["-", "-"]
    for folder in folders:
        assert (out / "probes" / folder / "report.html").is_file()
    for method in METHODS:
        after = load_checkpoint(str(out / method), load_model(str(base))[0])
        moved = update_rank(load_model(str(base))[0], after).to_json()
        record = json.loads((out / "probes" / f"{method}-drift" / "results.json").read_text())
        assert record["update_rank"] == moved
        assert any(weight["change"] for weight in moved["weights"].values())
        layers, mlps = record["drift"]["layers"].values(), record["smearing"]["mlps"].values()
        assert all(layer["change"] > 0 for layer in layers)
        expected = [1 - mean(layer["cka"] for layer in layers), mean(mlp["share90"] for mlp in mlps)]
        assert [float(cell) for cell in rows[method][5:]] == pytest.approx(expected, abs=6e-4)
    kept = (out / "probes" / "base" / "results.json").stat().st_mtime_ns
    for file in (out / "probes" / "adamw-drift").iterdir():
        file.unlink()
    assert main(arguments) == 0
    assert (out / "probes" / "adamw-drift" / "results.json").is_file()
    assert (out / "probes" / "base" / "results.json").stat().st_mtime_ns == kept, "what is there is not done again"
