"""A whole run: every method on the same model, domains, seed and data order, and its output folder."""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from torch import nn
from tqdm.auto import tqdm

from sparse_cl.data.checks import check_text
from sparse_cl.data.files import read_text
from sparse_cl.methods.carried import fingerprint
from sparse_cl.models.loading import load_model, load_tokenizer, quiet
from sparse_cl.models.processes import check_processes, processes

from . import embedded, figures
from .domains import Domain, check_domains, load_domains
from .embedded_model import embedded_model_folder
from .files import BASE, RESULTS, is_disk_full, read_json, write_json
from .folder import SETTINGS, FolderError, check_folder
from .prepared import Prepared
from .protection import text_to_protect
from .report import comparison, runs_with_capacity
from .results import add_intransigence, completed, failed_record, read_runs, run_record, write_runs
from .sequence import Progress, Scores, run_sequence, score_all
from .settings import Settings

INPUTS = "inputs.json"


def is_main_process() -> bool:
    """Whether this is the one process, of those of a distributed run, that writes and prints."""
    return processes().is_main_process


def run(settings: Settings, out: Path, domains: Sequence[Domain] | None = None) -> list[dict[str, Any]]:
    """Run every method, write `results.json`, `costs.json` and the pictures into `out`, and return the runs' records.

    Everything is checked before anything is written, so that bad input leaves no folder. A run that was stopped goes on
    after the last domain that was trained and scored, and ends with the same bits in `results.json`. A run that is
    finished is reported again. A method that fails is recorded as failed and the others go on; the next call with the
    same settings tries it again.

    Args:
        domains: as `load_domains` reads them for `settings`; None: they are read where they are needed.

    Raises:
        FolderError, DataError, ValueError, OSError: bad input, or a disk that is full; the message says what to do.
    """
    quiet()
    check_processes()
    check_folder(out, settings)
    if (out / RESULTS).is_file():
        runs = read_runs(out)
        if len(completed(runs)) == len(runs):
            return runs
    prepared, base_scores = prepare(settings, out, domains)
    return finish([run_method(name, prepared, base_scores, out) for name in settings.methods], out)


def prepare(settings: Settings, out: Path, domains: Sequence[Domain] | None = None) -> tuple[Prepared, Scores]:
    """Check all that a run reads, then write what the run is into `out` and score the base model.

    Raises:
        as `run`; nothing is written then.
    """
    reference = _reference_text(settings)
    protected = text_to_protect(settings.protect, settings.reference, reference, settings.max_length)
    if domains is None:
        domains = load_domains(settings.domains, settings.data, settings.seed, settings.columns)
    source = settings.model or str(embedded_model_folder())
    tokenizer, rows = load_tokenizer(source)
    check_domains(domains, tokenizer, rows, settings.max_length)
    for name, text in (("reference", reference), ("protect", protected)):
        if text is not None:
            check_text(text, f"--{name}", tokenizer, rows)
    model, tokenizer = load_model(source)
    prepared = Prepared(settings, source, tokenizer, domains, reference, protected)
    _check_methods(settings, model)
    limit = getattr(model.config, "max_position_embeddings", settings.max_length)
    if settings.max_length > limit:
        raise ValueError(f"max_length {settings.max_length} exceeds the model's context of {limit} tokens")
    inputs = _digests(domains, reference, protected)
    if (files := fingerprint(source)) is not None:
        inputs["--model"] = files
    _check_inputs(out, inputs)

    # A process that is late would find the folder of one that is early, half written.
    processes().wait_for_everyone()
    out.mkdir(parents=True, exist_ok=True)
    if is_main_process():
        write_json(out / SETTINGS, settings.to_json())
        write_json(out / INPUTS, inputs)
        for origin in filter(None, (domain.origin for domain in domains)):
            tqdm.write(origin, file=sys.stderr)
    return prepared, _base_scores(model, prepared, out)


def run_method(name: str, prepared: Prepared, base_scores: Scores, out: Path) -> dict[str, Any]:
    """The record of one method, trained on what it has not learned yet; of a failure where it fails.

    Raises:
        OSError: the disk is full.
    """
    folder = out / name
    folder.mkdir(exist_ok=True)
    path = folder / "progress.json"
    progress = Progress.from_json(read_json(path)) if path.is_file() else Progress([base_scores])
    settings = prepared.settings
    method = settings.make_method(name)

    def keep(progress: Progress) -> None:
        if is_main_process():
            write_json(path, progress.to_json())

    try:
        if len(progress.stages) <= len(prepared.domains):
            run_sequence(method, prepared.load_base(), prepared, folder, progress, keep)
        return run_record(name, method, settings, progress)
    except Exception as error:
        if is_disk_full(error):
            raise OSError(
                f"the disk of {out} is full ({error}). Free some of it; the same command then goes on after the "
                "last domain that was finished"
            ) from error
        warnings.warn(f"{name} failed and is left out: {type(error).__name__}: {error}", stacklevel=2)
        tqdm.write(traceback.format_exc(), file=sys.stderr)
        record = failed_record(name, method, settings, error)
    # What the method held must not be in the way of the next.
    del method
    clear_device_cache(garbage_collection=True)
    return record


def finish(runs: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Write what the records of all methods say together, and return them."""
    add_intransigence(runs)
    if is_main_process():
        draw_all(runs, out)
        (out / "comparison.txt").write_text(comparison(runs) + "\n", encoding="utf-8")
        write_runs(out, runs)
    return runs


def draw_all(runs: Sequence[dict[str, Any]], out: Path) -> None:
    """The pictures of a run's folder."""
    done = completed(runs)
    if not done:
        return
    figures.draw_matrices(done, out / "R.png")
    figures.draw_curves(done, out / "curves.png")
    if protecting := runs_with_capacity(done):
        figures.draw_capacity(protecting, out / "capacity.png")


def _check_methods(settings: Settings, model: nn.Module) -> None:
    """Whether all methods can train the model.

    Raises:
        ValueError: some cannot; each is named with the reason, and what can be run.
    """
    refused: dict[str, list[str]] = {}
    for name in settings.methods:
        try:
            settings.make_method(name).check(model)
        except ValueError as error:
            refused.setdefault(str(error), []).append(name)
    if refused:
        said = "; ".join(f"{', '.join(names)}: {why}" for why, names in refused.items())
        fitting = [name for name in settings.methods if not any(name in names for names in refused.values())]
        raise ValueError(said + (f". The others can be run: --method {','.join(fitting)}" if fitting else ""))


def _digests(domains: Sequence[Domain], reference: str | None, protected: str | None) -> dict[str, str]:
    """SHA-256 of the records and texts that a run reads, by name."""
    read: dict[str, Any] = {domain.name: {"name": domain.name, **domain.splits()} for domain in domains} | {
        "--reference": reference,
        "--protect": protected,
    }
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
        for name, value in read.items()
        if value is not None
    }


def _check_inputs(out: Path, inputs: dict[str, str]) -> None:
    """Whether a run that goes on reads what it read before.

    Raises:
        FolderError: some of it has changed; it is named.
    """
    path = out / INPUTS
    before = read_json(path) if path.is_file() else inputs
    if changed := [name for name, digest in inputs.items() if before.get(name, digest) != digest]:
        raise FolderError(
            f"{out}: what {', '.join(changed)} holds changed since this run began, so that its scores would not go "
            "together. Give another --out, or what it held before"
        )


def _reference_text(settings: Settings) -> str | None:
    if settings.reference is not None:
        return read_text(settings.reference, "--reference")
    return embedded.reference_text() if settings.model is None else None


def _base_scores(model: nn.Module, prepared: Prepared, out: Path) -> Scores:
    path = out / BASE
    if path.is_file():
        return Scores(**read_json(path))
    with tqdm(total=prepared.scores(0), desc="scoring the base model", mininterval=0.5) as bar:
        scores = score_all(model, prepared, 0, bar.update)
    if prepared.reference is not None:
        scores = replace(scores, drift=0.0)
    if is_main_process():
        write_json(path, asdict(scores))
    return scores
