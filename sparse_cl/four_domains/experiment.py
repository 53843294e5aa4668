"""A whole run: every method on the same model, domains, seed and data order, and its output folder."""

from __future__ import annotations

import json
import platform
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from . import embedded, figures
from .data import DataError, load_domains
from .embedded_model import embedded_model_folder
from .evaluate import METRICS
from .report import comparison, run_record, runs_with_capacity, write_json
from .sequence import Progress, Scores, run_sequence, score_all
from .settings import Settings

REFERENCE_CHARACTERS = 32768
"""How much of the reference text is scored: its beginning."""


class FolderError(ValueError):
    """An output folder that cannot be used."""


def check_folder(out: Path, settings: Settings, *, finished: bool = False) -> None:
    """Whether `out` may be this run's folder: absent, empty, or with an unfinished run of equal settings.

    Args:
        finished: whether a finished one will do too.

    Raises:
        FolderError: it holds another run, a finished one, or files that are no run's.
    """
    path = out / "settings.json"
    if path.is_file():
        held, wanted = json.loads(path.read_text(encoding="utf-8")), settings.to_json()
        if held != wanted:
            differing = sorted(key for key in {*held, *wanted} if held.get(key) != wanted.get(key))
            raise FolderError(
                f"{out} holds another run (it differs in {', '.join(differing)}). Give another --out, or delete it"
            )
        if (out / "results.json").is_file() and not finished:
            raise FolderError(f"{out} holds this very run, finished. Give another --out, or delete it to run it again")
    elif out.exists() and not out.is_dir():
        raise FolderError(f"{out} is a file; --out must be a folder")
    elif out.is_dir() and any(out.iterdir()):
        raise FolderError(f"{out} is not empty and holds no run of sparse-cl. Give another --out")


def load_model(source: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """A causal language model on this process's device, and its tokenizer, with a padding token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.to(accelerate.PartialState().device), tokenizer


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "sparse_cl")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def read_text(path: str, option: str) -> str:
    """The first `REFERENCE_CHARACTERS` of a file of plain text.

    Raises:
        DataError: it cannot be read as UTF-8 text, or is empty; `option` is named.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} {path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{option} {path}: the file is empty")
    return text[:REFERENCE_CHARACTERS]


def _reference_text(settings: Settings) -> str | None:
    if settings.reference is None:
        return embedded.reference_text() if settings.model is None else None
    return read_text(settings.reference, "--reference")


def is_main_process() -> bool:
    """Whether this is the one process, of those of a distributed run, that writes and prints."""
    return accelerate.PartialState().is_main_process


def quiet() -> None:
    """Of transformers, errors only: no bars beside our own, no advice, no deprecations inside it and peft."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def run(settings: Settings, out: Path, *, finished: bool = False) -> list[dict[str, Any]]:
    """Run every method, write `results.json` and the pictures into `out`, and return the runs' records.

    Everything is checked before anything is written, so that bad input leaves no folder. A run that was interrupted
    goes on after the last domain that was finished.

    Args:
        finished: a run that `out` holds finished is reported again, where it would be an error else.

    Raises:
        FolderError, DataError, ValueError, OSError: bad input; the message says what to do.
    """
    quiet()
    check_folder(out, settings, finished=finished)
    reference = _reference_text(settings)
    domains = load_domains(settings.domains, settings.data, settings.seed)
    source = settings.model or str(embedded_model_folder())
    model, tokenizer = load_model(source)
    for name in settings.methods:
        settings.make_method(name).check(model)
    limit = getattr(model.config, "max_position_embeddings", settings.max_length)
    if settings.max_length > limit:
        raise ValueError(f"max_length {settings.max_length} exceeds the model's context of {limit} tokens")

    is_main = is_main_process()
    out.mkdir(parents=True, exist_ok=True)
    if is_main:
        write_json(out / "settings.json", settings.to_json())
    base_scores = _base_scores(model, tokenizer, domains, reference, settings, out)
    runs = []
    for name in settings.methods:
        method = settings.make_method(name)
        folder = out / name
        folder.mkdir(exist_ok=True)
        path = folder / "progress.json"
        progress = Progress([base_scores])
        if path.is_file():
            progress = Progress.from_json(json.loads(path.read_text(encoding="utf-8")))
        if len(progress.stages) <= len(domains):
            model = model if model is not None else load_model(source)[0]
            run_sequence(
                method,
                model,
                tokenizer,
                domains,
                reference,
                settings,
                folder,
                progress,
                lambda so_far, path=path: write_json(path, so_far.to_json()) if is_main else None,
            )
            model = None
        runs.append(run_record(name, method.settings(), settings, progress, versions()))
    if is_main:
        figures.draw_matrices(runs, out / "R.png")
        figures.draw_curves(runs, out / "curves.png")
        if protecting := runs_with_capacity(runs):
            figures.draw_capacity(protecting, out / "capacity.png")
        (out / "comparison.txt").write_text(comparison(runs) + "\n", encoding="utf-8")
        write_json(out / "results.json", {"runs": runs})
    return runs


def _base_scores(
    model: nn.Module, tokenizer: Any, domains: list, reference: str | None, settings: Settings, out: Path
) -> Scores:
    path = out / "base.json"
    if path.is_file():
        return Scores(**json.loads(path.read_text(encoding="utf-8")))
    total = len(domains) * len(METRICS) + (reference is not None)
    with tqdm(total=total, desc="scoring the base model", mininterval=0.5) as bar:
        scores = score_all(model, tokenizer, domains, reference, settings, tick=bar.update)
    if is_main_process():
        write_json(path, scores.to_json())
    return scores
