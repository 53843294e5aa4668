"""What a run can be told: options of methods, kinds of methods, metrics, splits, a text to protect, autocast."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from sparse_cl.four_domains import embedded
from sparse_cl.four_domains.domains import DataError, Domain
from sparse_cl.four_domains.evaluate import drift_nats
from sparse_cl.four_domains.method_options import known_options, parse_set
from sparse_cl.four_domains.prepared import Prepared
from sparse_cl.four_domains.protection import in_windows, text_to_protect
from sparse_cl.four_domains.sequence import score_all
from sparse_cl.four_domains.settings import Settings, methods_named
from sparse_cl.four_domains.training import train
from sparse_cl.methods import METHODS


class Typed(METHODS["adamw"]):
    """Has an option of each type."""

    name, kind = "typed", "bound"
    options = ("share", "count", "most", "soft", "form", "word", "plain")

    def __init__(
        self,
        share: float = 0.5,
        count: int = 3,
        most: int | None = None,
        soft: bool = False,
        form: Literal["a", "b"] = "a",
        word: str | None = None,
        plain=2,
    ):
        self.all = dict(share=share, count=count, most=most, soft=soft, form=form, word=word, plain=plain)


@pytest.fixture(autouse=True)
def typed(monkeypatch):
    monkeypatch.setitem(METHODS, "typed", Typed)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_every_method_has_a_default(name):
    known = known_options(METHODS[name])
    assert all(f"{option}=" in known for option in METHODS[name].options)


def test_values_have_the_types_of_the_constructor():
    entries = ["typed.share=1", "typed.count=7", "typed.most=4", "typed.soft=true", "typed.form=b", "typed.word=3"]
    found = parse_set([*entries, "typed.plain=5"])["typed"]
    assert found == {"share": 1.0, "count": 7, "most": 4, "soft": True, "form": "b", "word": "3", "plain": 5}
    assert [type(value) for value in found.values()] == [float, int, int, bool, str, str, int]
    assert parse_set(["typed.most=none", "typed.word=None"]) == {"typed": {"most": None, "word": None}}
    assert parse_set(["orthogonal.energy=0.9"]) == {"orthogonal": {"energy": 0.9}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("energy=0.9", "expected METHOD.OPTION=VALUE"),
        ("typed.count", "expected METHOD.OPTION=VALUE"),
        ("adamz.x=1", "unknown method 'adamz'; there are adamw"),
        ("typed.rank=1", r"typed has no option 'rank'; it has: share=0\.5, count=3"),
        ("typed.count=1.5", r"expected a whole number, got '1\.5'"),
        ("typed.most=few", "expected a whole number or none, got 'few'"),
        ("typed.soft=1", "expected true or false, got '1'"),
        ("typed.form=c", "expected a or b, got 'c'"),
    ],
)
def test_what_cannot_be_set(entry, message):
    with pytest.raises(ValueError, match=f"--set .*{message}"):
        parse_set([entry])


def test_an_option_set_for_a_method_goes_before_the_common_one_and_reaches_no_other():
    settings = Settings(
        methods=("orthogonal", "orthogonal-lora"),
        options={"energy": 0.8},
        method_options={"orthogonal": {"energy": 0.9}},
    )
    assert settings.make_method("orthogonal").energy == 0.9
    assert settings.make_method("orthogonal-lora").energy == 0.8
    assert settings.to_json()["method_options"] == {"orthogonal": {"energy": 0.9}}
    with pytest.raises(ValueError, match="options are set for orthogonal, which this run has not: adamw"):
        Settings(methods=("adamw",), method_options={"orthogonal": {"energy": 0.9}})
    with pytest.raises(ValueError, match="given twice"):
        parse_set(["orthogonal.energy=0.9", "orthogonal.energy=0.8"])


def test_methods_by_kind():
    for word, kind in (("ours", "ours"), ("baselines", "baseline"), ("bounds", "bound")):
        assert methods_named((word,)) == tuple(name for name, method in METHODS.items() if method.kind == kind)
    assert methods_named(("all",)) == tuple(METHODS)
    assert methods_named(("lora", "bounds", "typed")) == ("lora", *methods_named(("bounds",)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"metrics": ("accuracy",)}, "bits_per_byte is what all is compared by; got only accuracy"),
        ({"metrics": ("bits_per_byte", "f1")}, "unknown f1; there are bits_per_byte, accuracy, exact_match"),
        ({"split": "train"}, "split: expected test or validation, got 'train'"),
        ({"autocast": "fp8"}, "autocast: expected bf16 or none, got 'fp8'"),
    ],
)
def test_settings_out_of_range(other, message):
    with pytest.raises(ValueError, match=message):
        Settings(**other)


def test_only_what_is_asked_for_is_scored(tiny_llama, tokenizer):
    choices = {
        "prompt": "p",
        "response": "The answer is (A) x.",
        "choices": ["x", "y"],
        "answer": "A",
        "answer_index": 0,
    }
    records = {split: [{"prompt": "1", "response": split * 2}] for split in ("train", "validation", "test")}
    domain = Domain("d", eval=[choices, {"prompt": "p", "response": "q", "answer": "q"}], **records)
    ticks = []

    def scores(**other):
        chosen = Settings(max_length=32, **other)
        prepared = Prepared(chosen, "", tokenizer, [domain])
        return score_all(tiny_llama, prepared, 1, lambda: ticks.append(1)).domains[0]

    everything = scores()
    assert None not in everything.values() and len(ticks) == 3
    ticks.clear()
    some = scores(metrics=("bits_per_byte", "accuracy"))
    assert some == {**everything, "exact_match": None} and len(ticks) == 2
    held_out = scores(split="validation")
    assert held_out["bits_per_byte"] != everything["bits_per_byte"]
    assert held_out["accuracy"] is held_out["exact_match"] is None


def test_the_text_to_protect_is_another_than_the_scored_one(tmp_path):
    scored, own = tmp_path / "scored.txt", tmp_path / "own.txt"
    scored.write_text("Once upon a time.")
    own.write_text("Another day. " * 10_000)
    assert text_to_protect(None, None, None, 16) is None
    assert own.read_text().startswith(text_to_protect(str(own), str(scored), "Once upon a time.", 16))
    with pytest.raises(DataError, match="this is the text that --reference scores"):
        text_to_protect(str(scored), str(tmp_path / "x" / ".." / "scored.txt"), "", 16)
    (tmp_path / "copy.txt").write_text("Once upon a time. And more.")
    with pytest.raises(DataError, match="begins with the text that is scored"):
        text_to_protect(str(tmp_path / "copy.txt"), str(scored), "Once upon a time.", 16)
    with pytest.raises(DataError, match="cannot be read"):
        text_to_protect(str(tmp_path / "absent.txt"), None, None, 16)
    embedded_text = text_to_protect("embedded", None, embedded.reference_text(), 16).splitlines()
    assert len(embedded_text) > 1000
    assert not set(embedded_text) & set(embedded.reference_text().splitlines())


def test_windows_do_not_overlap_and_are_whole(tokenizer):
    text = "What is one plus two? " * 20
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = in_windows(tokenizer, text, 16, most=3)
    assert [window for item in windows for window in item["input_ids"]] == ids[:48]
    assert windows[1]["labels"] == windows[1]["input_ids"] == ids[16:32]
    assert len(in_windows(tokenizer, text, len(ids) + 1)) == 1, "a text shorter than a window is one"
    assert len(in_windows(tokenizer, text, 16)) == len(ids) // 16
    with pytest.raises(ValueError, match="too short: 0 tokens"):
        in_windows(tokenizer, "", 16)


def test_drift_is_the_kl_divergence_from_the_base(tiny_llama):
    import copy

    tuned = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    windows = [[5, 6, 7, 8], [9, 10], [3, 4, 5]]
    expected = []
    for ids in windows:
        p, q = (model.double()(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (tiny_llama, tuned))
        expected += (p.exp() * (p - q)).sum(-1).tolist()
    tiny_llama.float(), tuned.float()
    assert drift_nats(tiny_llama, tuned, windows, batch_size=2) == pytest.approx(sum(expected) / 9, rel=1e-4)
    assert drift_nats(tiny_llama, tiny_llama, windows) == 0


@pytest.mark.parametrize("autocast", [None, "bf16"])
def test_autocast_is_for_training_alone(tiny_llama, tmp_path, autocast):
    from unittest.mock import Mock

    from transformers import default_data_collator

    ids = torch.arange(1, 9)
    before = tiny_llama(ids[None]).logits
    seen = []
    layer = tiny_llama.model.layers[0].mlp.up_proj
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for lr in (0.0, 1e-3):
        trainer = train(
            tiny_llama,
            [{"input_ids": ids, "labels": ids}] * 8,
            default_data_collator,
            lambda model, lr=lr: torch.optim.AdamW(model.parameters(), lr=lr),
            folder=tmp_path / "trainer",
            steps=4,
            batch_size=2,
            lr=1e-3,
            seed=0,
            bar=Mock(),
            autocast=autocast,
        )
        assert set(seen) == {torch.bfloat16 if autocast else torch.float32}
        seen.clear()
        assert all(parameter.dtype == torch.float32 for parameter in tiny_llama.parameters())
        assert trainer.timer.median_seconds() > 0
        tiny_llama.eval()
        logits = tiny_llama(ids[None]).logits
        assert set(seen) == {torch.float32}
        seen.clear()
        assert torch.equal(logits, before) == (lr == 0)
    hook.remove()
