"""`sparse-cl probe`, from the command line to the report."""

import json
import re

import pytest
import torch

from sparse_cl.cli import main
from sparse_cl.four_domains.domains import load_domains
from sparse_cl.probes import ActivationProbe, ActivationScores, GradientProbe, compare_gradients, overlap
from sparse_cl.report.batches import domain_batches
from sparse_cl.report.probe import probe_model, sections
from sparse_cl.report.settings import PROBES, ProbeSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two domains of 24 records with words of their own."""
    folder = tmp_path_factory.mktemp("data")
    for domain, words in (("code", "def return if else"), ("math", "one plus two is three")):
        picked = [words.split()[(i * 7 + i // 3) % len(words.split())] for i in range(200)]
        for split in ("train", "test"):
            records = [
                {"prompt": " ".join(picked[i : i + 3]), "response": " ".join(picked[i + 3 : i + 7])} for i in range(24)
            ]
            (folder / f"{domain}.{split}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


@pytest.fixture
def model_folder(tiny_llama, tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def batches_of(data, tokenizer, model):
    domains = load_domains(("code", "math"), str(data), 0)
    return domain_batches(domains, tokenizer, model, records=128, batch_size=4, max_length=64)


def arguments(model, data, out, *more):
    chosen = ["probe", "--model", str(model), "--data", str(data)]
    return [*chosen, "--domains", "code,math", "--batch-size", "4", "--max-length", "64", "--out", str(out), *more]


def test_a_report_and_its_numbers(model_folder, data, tiny_llama, tokenizer, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(model_folder, data, out, "--critical")) == 0
    told = capsys.readouterr()
    assert "capacity" in told.err or "batch" in told.err, "a progress bar"
    record = json.loads((out / "results.json").read_text())
    batches = batches_of(data, tokenizer, tiny_llama)
    scores = {domain: ActivationProbe(tiny_llama).run(part) for domain, part in batches.items()}
    assert record["activation"] == {domain: found.to_json() for domain, found in scores.items()}
    assert record["overlap"] == overlap(scores).to_json()
    gradients = {domain: GradientProbe(tiny_llama).run(part) for domain, part in batches.items()}
    cosines = compare_gradients(gradients).to_json()
    assert record["cosines"]["model"]["cosine"] == pytest.approx(cosines["model"]["cosine"], abs=1e-5)
    assert {domain: one["increase"] for domain, one in record["critical_sparsity"].items()} == {
        "code": 0.01,
        "math": 0.01,
    }
    for layer in record["capacity"]["layers"].values():
        assert 0 < layer["used"][0] <= layer["used"][1] <= layer["width"] and layer["surviving"][0] == 1.0
    for domain, found in scores.items():
        loaded = ActivationScores.load(out / f"activation-{domain}.safetensors")
        assert loaded.top(0.25) == found.top(0.25)
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", page), "it loads nothing"
    for section in sections(record):
        assert section.title in page and section.sentence in told.out
    assert not any(value != value for value in _numbers(record))


def _numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, float):
        yield value


def test_only_what_is_asked_for_is_probed(model_folder, data, tmp_path):
    for probe, parts in {
        "activation": {"activation", "overlap", "hubs", "hub_weights", "dormant"},
        "gradients": {"gradients", "cosines", "interference"},
        "curvature": {"curvature"},
        "rank": {"rank"},
        "capacity": {"capacity"},
    }.items():
        out = tmp_path / probe
        assert main(arguments(model_folder, data, out, "--probes", probe)) == 0
        record = json.loads((out / "results.json").read_text())
        assert record.keys() - {"model", "settings", "versions", "seconds"} == parts


def test_one_domain_is_probed_without_comparisons(model_folder, data, tmp_path):
    out = tmp_path / "out"
    assert main([*arguments(model_folder, data, out), "--domains", "code"]) == 0
    record = json.loads((out / "results.json").read_text())
    assert not {"overlap", "hubs", "cosines"} & record.keys()
    assert record["capacity"]["domains"] == ["code"]


def test_the_weights_and_modes_are_as_before(data, tiny_llama, tokenizer):
    before = {name: p.clone() for name, p in tiny_llama.named_parameters()}
    tiny_llama.train()
    for name, parameter in tiny_llama.named_parameters():
        parameter.requires_grad_("mlp" in name)
    settings = ProbeSettings(batch_size=4, max_length=64)
    probe_model(
        tiny_llama,
        batches_of(data, tokenizer, tiny_llama),
        settings,
    )
    assert tiny_llama.training and all(p.grad is None for p in tiny_llama.parameters())
    assert all(torch.equal(p, before[name]) for name, p in tiny_llama.named_parameters())
    assert all(p.requires_grad == ("mlp" in name) for name, p in tiny_llama.named_parameters())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--probes", "luck"], "unknown probe 'luck'; there are activation, gradients"),
        (["--energy", "0"], "energy: expected a share in (0, 1], got 0.0"),
        (["--domains", "law"], "domain 'law': no file"),
        (["--max-length", "100000"], "max_length: expected at most the model's context of 256 tokens, got 100000"),
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "a", "b"], "expected one, got 2; several are compared by `python -m benchmarks.arena scale`"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model_folder, data, tmp_path, capsys, more, message):
    out = tmp_path / "out"
    given = arguments(model_folder, data, out)
    if "--model" in more:  # given twice, it would name two
        place = given.index("--model")
        given = given[:place] + given[place + 2 :]
    assert main([*given, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not out.exists()


def test_a_folder_that_is_not_empty_is_left_alone(model_folder, data, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert main(arguments(model_folder, data, out)) == 2
    assert "is not empty; give another --out, or delete it" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_weights_that_are_not_numbers_are_named(model_folder, data, tiny_llama, tmp_path, capsys):
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    tiny_llama.save_pretrained(model_folder)
    assert main(arguments(model_folder, data, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "domain 'code': activations that are not finite in model.layers.1.mlp" in error and "batch 1" in error


def test_every_probe_is_named_in_the_settings():
    assert ProbeSettings().probes == PROBES
    with pytest.raises(ValueError, match="probes: expected at least one of activation"):
        ProbeSettings(probes=())
