"""Snippets of the README and the guide, and a fresh process for each."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRELOADED = ("torch", "transformers.trainer", "transformers.models.llama.modeling_llama", "peft", "torch._dynamo")
"""Imported once for all processes. What a snippet does not import itself it has no name for, all the same."""


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page; `place` is the page and the line of the fence."""

    place: str
    language: str
    text: str

    def __str__(self) -> str:
        return self.place


def snippets(language: str) -> list[Snippet]:
    """The blocks in a language, of all pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Snippet(f"{page.relative_to(ROOT)}:{line}", language, match[1]))
    return found


def commands(program: str) -> list[tuple[str, list[str]]]:
    """The arguments of each call of a program in shell blocks, and where it stands."""
    found = []
    for snippet in snippets("bash"):
        for line in re.sub(r"\\\n\s*", " ", snippet.text).splitlines():
            words = shlex.split(line, comments=True)
            parts = program.split()
            starts = [i for i in range(len(words)) if words[i : i + len(parts)] == parts]
            found += [(snippet.place, words[start + len(parts) :]) for start in starts[:1]]
    return found


def run_alone(snippet: Snippet, folder: Path, environment: dict[str, str], timeout: float = 300) -> None:
    """Runs a Python snippet in a process of its own, in `folder`.

    Raises:
        AssertionError: it fails; with what it printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    log = folder / "output.txt"
    process = context.Process(target=_run, args=(snippet, folder, environment, log))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{snippet.place}: exit {process.exitcode}\n{log.read_text(encoding='utf-8')}"


def _run(snippet: Snippet, folder: Path, environment: dict[str, str], log: Path) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    with log.open("w", encoding="utf-8") as output, contextlib.redirect_stdout(output):
        with contextlib.redirect_stderr(output):
            try:
                exec(compile(snippet.text, snippet.place, "exec"), {"__name__": "__main__"})
            except BaseException:
                traceback.print_exc()
                output.flush()
                os._exit(1)
    sys.stdout.flush()
