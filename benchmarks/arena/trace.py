"""TRACE (Wang et al. 2023, arXiv:2310.06762): eight tasks that `sparse-cl learn` learns one after another; its scores.

The data are TRACE's own: a folder for each task with train.json, eval.json and test.json, each a list of {"prompt",
"answer"}. Epochs, lengths and metrics are its own too; answers are greedy, where it samples. R[t][i], in percent, is
the score on the i-th task after the t-th: OP = mean_{i<=T} R[T][i], BWT = mean_{i<=T} R[T][i] − R[i][i].
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from statistics import fmean
from typing import Any

from sparse_cl.arguments import positive
from sparse_cl.data.reading import read_files
from sparse_cl.data.records import Records
from sparse_cl.four_domains.files import RESULTS, read_json, write_json
from sparse_cl.four_domains.folder import differences
from sparse_cl.four_domains.report import text_table

PROMPT, ANSWER = 1024, 512
"""Tokens."""
_COLUMNS = {"response": "answer"}
Scores = Callable[[Sequence[str], Sequence[str], Sequence[str]], float]
"""Of prompts, answers and what was wanted, in percent."""


def accuracy(prompts: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the answers that are as wanted."""
    return 100 * fmean(answer == right for answer, right in zip(answers, wanted, strict=True))


def choice(prompts: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of the answers whose first character, the choice, is as wanted; a reasoning may follow."""
    return accuracy(prompts, [answer[:1] for answer in answers], [right[:1] for right in wanted])


def rouge_l(prompts: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> float:
    """F of ROUGE-L, by the package that TRACE takes; nothing for an answer without a word."""
    from rouge import Rouge

    rouge = Rouge(metrics=["rouge-l"])
    pairs = [pair for pair in zip(wanted, answers, strict=True) if all(text.strip(" .\n\t") for text in pair)]
    return 100 * sum(rouge.get_scores(*pair)[0]["rouge-l"]["f"] for pair in pairs) / len(wanted)


def sari(prompts: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> float:
    """SARI (Xu et al. 2016) of simplified texts against the prompt and what was wanted; its code is on the Hub."""
    import evaluate

    found = evaluate.load("sari").compute(
        sources=list(prompts), predictions=list(answers), references=[[right] for right in wanted]
    )
    assert found is not None
    return found["sari"]


def similarity(prompts: Sequence[str], answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Matching characters of lines of code, in whole percents, with Py150's marks of literals as `plain_code`.

    As fuzzywuzzy has it, without python-Levenshtein, whose count is another.
    """
    pairs = ((plain_code(answer), plain_code(right)) for answer, right in zip(answers, wanted, strict=True))
    return fmean(round(100 * SequenceMatcher(None, *pair).ratio()) if all(pair) else 0 for pair in pairs)


def plain_code(code: str) -> str:
    """Code with literals for Py150's marks: "<STR_LIT:x>" is x, "<NUM_LIT>" 0, an unnamed text nothing."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return re.sub(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", r"\1", code, flags=re.DOTALL)


TASKS: Mapping[str, tuple[int, Scores, tuple[str, ...]]] = {
    "C-STANCE": (5, accuracy, ()),
    "FOMC": (3, accuracy, ()),
    "MeetingBank": (7, rouge_l, ("rouge",)),
    "Py150": (5, similarity, ()),
    "ScienceQA": (3, choice, ()),
    "NumGLUE-cm": (5, accuracy, ()),
    "NumGLUE-ds": (5, accuracy, ()),
    "20Minuten": (7, sari, ("evaluate", "sacrebleu", "sacremoses")),
}
"""In the order of TRACE: epochs, metric, and the packages that it wants."""
SET_HERE = ("model", "data", "eval", "columns", "epochs", "max-length", "out")
"""Options of `sparse-cl learn` that a run gives itself."""


@dataclass(frozen=True)
class Trace:
    """A run.

    Attributes:
        data: folder of the tasks' folders.
        out: of the last model, the answers and the results.
        options: of `sparse-cl learn`, but for `SET_HERE`.
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

    def check(self) -> dict[str, Records]:
        """Whether all is there, before hours go by; the test records of each task.

        Raises:
            DataError, ValueError: a task that is not TRACE's, a file or a package that is missing, bad records, an
                option that is set here, or other settings than those with which the run in `out` was begun.
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
        for option in self.options:
            if option.startswith("--") and option[2:].partition("=")[0] in SET_HERE:
                raise ValueError(f"{option} is set for each task; leave it out")
        records = {task: read_files([self.data / task / "test.json"], _COLUMNS) for task in self.tasks}
        if "20Minuten" in self.tasks:
            sari(["a"], ["a"], ["a"])  # fetches its code
        begun, now = self._results().get("settings"), self._settings(records)
        if begun is not None and (differing := differences(begun, now)):
            raise ValueError(f"--out {self.out}: another run was begun there (it differs in {differing}); give another")
        return records

    def run(self) -> list[list[float]]:
        """Learn and score the tasks that are missing; returns R, a row for each task.

        Of the models only the last is kept.
        """
        from accelerate.utils.memory import clear_device_cache

        records = self.check()
        R = self._results().get("R", [])
        for number in range(len(R), len(self.tasks)):
            self._drop(number - 1)
            self._learn(number)
            R.append(self._score(number, records))
            clear_device_cache(garbage_collection=True)  # the next task is learned by another process
            write_json(self.out / RESULTS, {"settings": self._settings(records), "R": R})
        self._drop(len(self.tasks) - 1)
        return R

    def _settings(self, records: Mapping[str, Records]) -> dict[str, Any]:
        asked = {"model": self.model, "tasks": list(self.tasks), "options": list(self.options), "records": self.records}
        return {**asked, "data": {task: found.fingerprint for task, found in records.items()}}

    def _results(self) -> dict[str, Any]:
        path = self.out / RESULTS
        return read_json(path) if path.is_file() else {}

    def _folder(self, number: int) -> Path:
        return self.out / f"{number + 1}-{self.tasks[number]}"

    def _drop(self, end: int) -> None:
        """Delete the models before the `end`-th."""
        for number in range(max(0, end)):
            shutil.rmtree(self._folder(number), ignore_errors=True)

    def _learn(self, number: int) -> None:
        name = self.tasks[number]
        values = (
            self.model if number == 0 else self._folder(number - 1),
            *(self.data / name / f"{split}.json" for split in ("train", "eval")),
            *("response=answer", TASKS[name][0], PROMPT + ANSWER, self._folder(number)),
        )
        given = [str(word) for option, value in zip(SET_HERE, values, strict=True) for word in (f"--{option}", value)]
        # A process of its own, so that nothing of training is left on the GPU when answers are written.
        done = subprocess.run([sys.executable, "-m", "sparse_cl", "learn", *given, *self.options], check=False)
        if done.returncode:
            raise ValueError(f"{name} was not learned; sparse-cl learn says above why. The same command goes on here")

    def _score(self, last: int, records: Mapping[str, Records]) -> list[float]:
        """The scores of all tasks up to the `last`; what was answered is written beside them."""
        import torch

        from sparse_cl.four_domains.evaluate import continuations
        from sparse_cl.learn.source import Source
        from sparse_cl.methods.lora import LoRA
        from sparse_cl.models.loading import load_tokenizer
        from sparse_cl.models.passes import evaluation

        source = Source(str(self._folder(last)))
        tokenizer = load_tokenizer(source.base)[0]
        # As LoRA loads it, an adapter stays beside its base: rounded into bfloat16 weights it would be another.
        model, _ = source.load(LoRA(), torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        row = []
        for task in self.tasks[: last + 1]:
            # Prompts of like lengths waste less on padding.
            tested = sorted(records[task].records[: self.records], key=lambda record: len(record["prompt"]))
            prompts, wanted = ([record[field] for record in tested] for field in ("prompt", "response"))
            answers: list[str] = []
            with evaluation(model):
                for start in range(0, len(prompts), self.batch_size):
                    batch = prompts[start : start + self.batch_size]
                    answers += continuations(model, tokenizer, batch, ANSWER, PROMPT)
            stripped = ([text.strip() for text in texts] for texts in (answers, wanted))
            row.append(TASKS[task][1](prompts, *stripped))
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
    parser.add_argument("--records", type=positive, metavar="N", help="first test records of each task (default: all)")
    parser.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="prompts that are answered at once"
    )
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="of sparse-cl learn, as --method lora")
    parser.set_defaults(command=_trace, resumes=True)


def _trace(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in ("model", "data", "out", "records", "batch_size")}
    tasks = tuple(arguments.tasks.split(","))
    print(table(tasks, Trace(**given, tasks=tasks, options=tuple(arguments.options)).run()))
