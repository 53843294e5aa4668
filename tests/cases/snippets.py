"""Snippets of the README and the guide, and a fresh process for each."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases.forked import exit_code

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def run_alone(snippet: Snippet, folder: Path, environment: dict[str, str]) -> tuple[int | None, str]:
    """Runs a Python snippet in a process of its own, in `folder`; its exit code, and what it printed."""
    log = folder / "output.txt"
    code = exit_code(_run, snippet, folder, log, **environment)
    return code, log.read_text(encoding="utf-8") if log.is_file() else ""


def _run(snippet: Snippet, folder: Path, log: Path) -> int:
    import torch

    os.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    with log.open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            torch.manual_seed(0)
            exec(compile(snippet.text, snippet.place, "exec"), names)
            for mark, check in CHECKS.items():
                if mark in snippet.text:
                    check(names, _start(snippet.text) if "\nmodel = " in snippet.text else {})
        except BaseException:
            traceback.print_exc()
            return 1
    return 0


def _start(text: str) -> dict[str, Any]:
    """The parameters of the snippet's model as they were when it was made, by name."""
    import torch

    lines = text.splitlines()
    (made, *_) = [number for number, line in enumerate(lines) if line.startswith("model = ")]
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec("\n".join(lines[: made + 1]), names)
    return dict(names["model"].named_parameters())


def _changed_where_masked(names: dict[str, Any], start: dict[str, Any]) -> None:
    import torch

    for name, param in names["model"].named_parameters():
        mask = names["masks"].get(name)
        active = torch.zeros(param.shape).bool() if mask is None else mask.to_dense()
        assert torch.equal(param[~active], start[name][~active]), name
        assert not active.any() or (param[active] != start[name][active]).float().mean() > 0.9, name


def _kept_out_of_the_memory(names: dict[str, Any], start: dict[str, Any]) -> None:
    merged, memory = names["adapted"].merge_and_unload(), names["memory"]
    assert all(leak <= 1e-6 for leak in memory.leak(start, merged).values())
    assert all(not (merged.get_parameter(name) == start[name]).all() for name in memory.names)


def _room_is_left(names: dict[str, Any], start: dict[str, Any]) -> None:
    assert all(0 < layer["used"] < layer["width"] for layer in names["memory"].capacity().values())
    assert Path("memory.safetensors").exists()


def _two_domains_and_a_text(names: dict[str, Any], start: dict[str, Any]) -> None:
    assert names["method"].memory.domains == 3


def _two_domains_and_their_folders(names: dict[str, Any], start: dict[str, Any]) -> None:
    assert names["method"].memory.domains == 2
    assert all(Path(f"out/{name}/sparse_cl/memory.safetensors").is_file() for name in ("support", "law"))


CHECKS: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    '"2.bias": RowMask([]': _changed_where_masked,
    "optimizers=(optimizer, None)": _changed_where_masked,
    "callbacks=[ContinualCallback(method)]": _two_domains_and_their_folders,
    "orthogonal_lora(": _kept_out_of_the_memory,
    "memory.save(": _room_is_left,
    "method.protect(": _two_domains_and_a_text,
}
"""What a snippet must have done: a part of its text, and a check of its names and of its model's first weights."""
