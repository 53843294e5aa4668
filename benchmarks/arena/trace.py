"""TRACE (Wang et al. 2023, arXiv:2310.06762): eight tasks that `sparse-cl learn` learns one after another; its scores.

The data are TRACE's own: a folder for each task with train.json, eval.json and test.json, each a list of {"prompt",
"answer"}. Epochs, lengths and metrics are its own too; answers are greedy, where it samples. R[t][i], in percent, is
the score on the i-th task after the t-th: OP = mean_{i<=T} R[T][i], BWT = mean_{i<=T} R[T][i] − R[i][i].
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sparse_cl.four_domains.files import write_json
from sparse_cl.four_domains.report import text_table

PROMPT, ANSWER = 1024, 512
"""Tokens."""
Scores = Callable[[Sequence[str], Sequence[str], Sequence[str]], float]
"""Of prompts, answers and what was wanted, in percent."""


def accuracy(prompts: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the answers that are as wanted, but for white space around them."""
    return 100 * fmean(answer.strip() == right.strip() for answer, right in zip(answers, wanted, strict=True))


def choice(prompts: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the answers whose first character, the choice, is as wanted; a reasoning may follow."""
    return accuracy(prompts, [answer.strip()[:1] for answer in answers], [right.strip()[:1] for right in wanted])


def rouge_l(prompts: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> float:
    """F of ROUGE-L, by the package that TRACE takes; nothing for an answer without a word."""
    from rouge import Rouge

    rouge = Rouge(metrics=["rouge-l"])
    pairs = [pair for pair in zip(answers, wanted, strict=True) if all(text.strip(" .\n\t") for text in pair)]
    return 100 * sum(rouge.get_scores(*pair)[0]["rouge-l"]["f"] for pair in pairs) / len(wanted)


def sari(prompts: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> float:
    """SARI (Xu et al. 2016) of simplified texts against the prompt and what was wanted."""
    import evaluate

    found = evaluate.load("sari").compute(
        sources=list(prompts), predictions=list(answers), references=[[right] for right in wanted]
    )
    assert found is not None
    return found["sari"]


def similarity(prompts: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Edit similarity of lines of code, with Py150's marks of literals replaced by what they stand for."""
    from rapidfuzz import fuzz

    return fmean(fuzz.ratio(plain_code(a), plain_code(right)) for a, right in zip(answers, wanted, strict=True))


def plain_code(code: str) -> str:
    """Code with literals for Py150's marks: "<STR_LIT:x>" is x, "<NUM_LIT>" 0, an unnamed text nothing."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.DOTALL)


TASKS: dict[str, tuple[int, Scores, tuple[str, ...]]] = {
    "C-STANCE": (5, accuracy, ()),
    "FOMC": (3, accuracy, ()),
    "MeetingBank": (7, rouge_l, ("rouge",)),
    "Py150": (5, similarity, ("rapidfuzz",)),
    "ScienceQA": (3, choice, ()),
    "NumGLUE-cm": (5, accuracy, ()),
    "NumGLUE-ds": (5, accuracy, ()),
    "20Minuten": (7, sari, ("evaluate", "sacrebleu", "sacremoses")),
}
"""In the order of TRACE: epochs, metric, and the packages that it wants."""


@dataclass(frozen=True)
class Trace:
    """A run.

    Attributes:
        data: folder of the tasks' folders.
        out: of the last model, the answers and the results.
        options: of `sparse-cl learn` beside those that are set here; a repeated one counts as it stands here.
        records: first test records of each task that are scored; None: all.
        batch_size: prompts at once.
    """

    model: str
    data: Path
    out: Path
    tasks: tuple[str, ...] = tuple(TASKS)
    options: tuple[str, ...] = ()
    records: int | None = None
    batch_size: int = 16

    def check(self) -> None:
        """Whether all is there, before hours go by.

        Raises:
            ValueError: a task that is not TRACE's, a file or a package that is missing, or other settings than those
                with which the run in `out` was begun.
        """
        if not self.data.is_dir():
            raise ValueError(f"--data {self.data}: no such folder")
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"--tasks: {task} is none of TRACE; there are {', '.join(TASKS)}")
            for split in ("train", "eval", "test"):
                if not (self.data / task / f"{split}.json").is_file():
                    raise ValueError(f"--data {self.data}: expected TRACE's file {task}/{split}.json; there is none")
            if missing := [name for name in TASKS[task][2] if importlib.util.find_spec(name) is None]:
                raise ValueError(f"{task} is scored by {', '.join(missing)}; pip install {' '.join(missing)}")
        begun = self._results().get("settings", self.to_json())
        if begun != self.to_json():
            raise ValueError(f"--out {self.out}: a run with other settings was begun there: {begun}; take a new folder")

    def to_json(self) -> dict[str, Any]:
        return {
            **{"model": self.model, "tasks": list(self.tasks), "options": list(self.options)},
            **{"records": self.records},
        }

    def run(self) -> list[list[float]]:
        """Learn and score the tasks that are missing; returns R, a row for each task.

        Of the models only the last is kept.
        """
        self.check()
        R = self._results().get("R", [])
        for number in range(len(R), len(self.tasks)):
            folder = self._learn(number)
            R.append(self._score(folder, number))
            write_json(self.out / "results.json", {"settings": self.to_json(), "R": R})
            if number:
                shutil.rmtree(self._folder(number - 1))
        return R

    def _results(self) -> dict[str, Any]:
        path = self.out / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _folder(self, number: int) -> Path:
        return self.out / f"{number + 1}-{self.tasks[number]}"

    def _learn(self, number: int) -> Path:
        task, folder = self.data / self.tasks[number], self._folder(number)
        options = {
            "model": self.model if number == 0 else self._folder(number - 1),
            "data": task / "train.json",
            "eval": task / "eval.json",
            "columns": "response=answer",
            "epochs": TASKS[self.tasks[number]][0],
            "max-length": PROMPT + ANSWER,
            "out": folder,
        }
        given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        # A process of its own, so that nothing of training is left on the GPU when answers are written.
        subprocess.run([sys.executable, "-m", "sparse_cl", "learn", *given, *self.options], check=True)
        return folder

    def _score(self, folder: Path, last: int) -> list[float]:
        """The scores of all tasks up to the `last`; what was answered is written beside them."""
        import torch

        from sparse_cl.data.reading import read_files
        from sparse_cl.four_domains.evaluate import continuations
        from sparse_cl.learn.source import Source
        from sparse_cl.methods.adamw import AdamW
        from sparse_cl.models.loading import load_tokenizer
        from sparse_cl.models.passes import evaluation

        source = Source(str(folder))
        tokenizer = load_tokenizer(source.base)[0]
        model, _ = source.load(AdamW(), torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        row = []
        for task in self.tasks[: last + 1]:
            test = read_files([self.data / task / "test.json"], {"response": "answer"})
            records = sorted(test.records[: self.records], key=lambda record: len(record["prompt"]))
            prompts, wanted = ([record[field] for record in records] for field in ("prompt", "response"))
            answers: list[str] = []
            with evaluation(model):
                for start in range(0, len(prompts), self.batch_size):
                    batch = prompts[start : start + self.batch_size]
                    answers += continuations(model, tokenizer, batch, ANSWER, PROMPT)
            row.append(TASKS[task][1](prompts, answers, wanted))
            written = {"prompts": prompts, "results": answers, "labels": wanted}
            write_json(self.out / f"answers-{last + 1}-{task}.json", written)
        return row


def table(tasks: Sequence[str], R: Sequence[Sequence[float]]) -> str:
    """A row for each task that was learned, with OP and BWT of those so far."""
    rows = []
    for task, scores in zip(tasks, R, strict=False):
        changes = [score - R[i][i] for i, score in enumerate(scores)]
        shown = [f"{score:.1f}" for score in scores] + [""] * (len(tasks) - len(scores))
        rows.append([task, *shown, f"{fmean(scores):.1f}", f"{fmean(changes):+.1f}"])
    return text_table(("after", *tasks, "OP", "BWT"), rows)


def add_parser(commands: Any) -> None:
    """Adds `trace` to argparse's subparsers."""
    parser = commands.add_parser(
        "trace",
        help="the eight tasks of TRACE, on its own data (docs/trace.md)",
        description="Learn the tasks of TRACE one after another by sparse-cl learn, and score the answers to each "
        "after each. What was stopped goes on with the same command. Options of sparse-cl learn stand after --.",
    )
    parser.add_argument("--model", required=True, help="a folder or a name on the Hub")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="a folder for each task")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--tasks", default=",".join(TASKS), metavar="TASK,…", help="in the order of learning")
    parser.add_argument("--records", type=int, metavar="N", help="first test records of each task (default: all)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts that are answered at once")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="of sparse-cl learn, as --method lora")
    parser.set_defaults(command=_trace, resumes=True)


def _trace(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in ("model", "data", "out", "records", "batch_size")}
    tasks = tuple(arguments.tasks.split(","))
    print(table(tasks, Trace(**given, tasks=tasks, options=tuple(arguments.options)).run()))
