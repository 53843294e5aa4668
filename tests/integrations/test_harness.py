"""The tasks of lm-evaluation-harness on a folder of domains score what the runner's accuracy scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_cl.four_domains.evaluate import accuracy

lm_eval = pytest.importorskip("lm_eval")

TASKS = Path(__file__).parents[2] / "benchmarks" / "harness"
SOURCES = {
    "math": ("aqua-rat",),
    "medical": ("medmcqa", "mmlu-medical", "pubmedqa"),
    "general": ("ecqa", "creak", "openbookqa", "arc-challenge"),
}


def record(source, number):
    """Choices by letter or by name, more than one of them likely; not all of ASCII, so that bytes count."""
    choices, right = ["five", "ßix of them", f"number {number}", "ten"], number % 4
    common = {"source": source, "choices": choices, "answer_index": right, "prompt": f"{source} asks {number}:"}
    if number % 3 == 0:
        return {**common, "answer": choices[right], "response": f"Since so. The answer is {choices[right]}."}
    if number % 3 == 1:
        return {**common, "answer": choices[right], "response": choices[right]}
    letter = "ABCD"[right]
    return {**common, "answer": letter, "response": f"The answer is ({letter}) {choices[right]}."}


def test_it_agrees_with_accuracy(tiny_llama, tokenizer, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    records = {source: [record(source, n) for n in range(9)] for sources in SOURCES.values() for source in sources}
    for domain, sources in SOURCES.items():
        lines = [json.dumps(one) for source in sources for one in records[source]]
        (tmp_path / f"{domain}.eval.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    tasks = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(tmp_path)})
    model = HFLM(pretrained=tiny_llama, tokenizer=tokenizer, device="cpu")
    found = lm_eval.simple_evaluate(model=model, tasks=["domains"], task_manager=tasks, bootstrap_iters=0)

    scores = {name: row["acc_bytes,none"] for name, row in found["results"].items() if name != "domains"}
    ours = sorted(accuracy(tiny_llama, tokenizer, own, 64) for own in records.values())
    assert sorted(scores.values()) == pytest.approx(ours)
    assert 0 < sum(ours) < len(ours) == 8
