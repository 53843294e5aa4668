"""Probes around a run: of the base model before it, of each method's model after it, and of the drift between."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from sparse_cl.four_domains.domains import load_domains
from sparse_cl.four_domains.embedded_model import embedded_model_folder
from sparse_cl.four_domains.report import number
from sparse_cl.four_domains.settings import Settings
from sparse_cl.four_domains.table import text_table
from sparse_cl.models.loading import load_model

from .checkpoints import load_checkpoint
from .drift import drift_study
from .probe_study import study_model
from .section import mean_of_known, nearest
from .settings import DriftSettings, ProbeSettings

FOLDER = "probes"

LEGEND = """\
overlap  IoU of the top 5 % of the neurons, mean over pairs of domains and layers
cosine   of domains' gradients, mean over pairs and layers
active   share of the neurons that holds 99 % of a token's L1 mass
rank     effective rank of the hidden states, mean over domains and layers
used     share of the input directions that the domains use, mean over layers
drift    1 - CKA of the hidden states on the reference text, mean over layers
update   share of an MLP's neurons that holds 90 % of the update, mean over MLPs
Nulls, ceilings and intervals are in the reports."""


def probe_run(settings: Settings, out: Path) -> list[str]:
    """Reports on a finished run, in `out/probes`, and a table of them. Reports that are there are kept.

    Args:
        settings: of the run.
        out: its folder.
    """
    source = settings.model or str(embedded_model_folder())
    domains = load_domains(settings.domains, settings.data, settings.seed, settings.columns)
    same = {
        name: getattr(settings, name) for name in ("data", "domains", "columns", "batch_size", "max_length", "seed")
    }
    probes = ProbeSettings(() if settings.model is None else (settings.model,), **same)
    rows = []
    for name in ("base", *settings.methods):
        folder, moved = out / FOLDER / name, out / FOLDER / f"{name}-drift"
        if not (folder / "results.json").is_file():
            model, tokenizer = load_model(source)
            if name != "base":
                model = load_checkpoint(str(out / name), model)
            study_model(model, tokenizer, name, domains, probes, folder)
        if name != "base" and not (moved / "results.json").is_file():
            drift_study(DriftSettings(source, str(out / name), settings.reference, **same), moved)
        rows.append((name, *_of_model(_read(folder)), *_of_drift(_read(moved) if name != "base" else None)))
    header = ("model", *(line.split()[0] for line in LEGEND.splitlines()[:-1]))
    table = f"{text_table(header, rows)}\n{LEGEND}"
    (out / FOLDER / "comparison.txt").write_text(table + "\n", encoding="utf-8")
    return [table, "", f"Written to {out / FOLDER}: comparison.txt, and report.html of each model and of each drift"]


def _of_model(record: Mapping[str, Any]) -> list[str]:
    """The cells overlap to used, from what `sparse-cl probe` writes. One domain has no overlap and no cosine."""
    overlap = cosine = None
    if "overlap" in record:
        at = nearest(record["overlap"]["fractions"], 0.05)
        overlap = mean(pair[at] for pair in record["overlap"]["mean_iou"])
        cosine = mean_of_known(value for layer in record["cosines"]["layers"].values() for value in layer["cosine"])
    active = mean(domain["mean"]["product"]["needed"]["0.99"]["mean"] for domain in record["activation"].values())
    ranks = [layer["effective_rank"] for part in record["rank"].values() for layer in part["layers"].values()]
    used = [layer["used"][-1] / layer["width"] for layer in record["capacity"]["layers"].values()]
    return [number(overlap), number(cosine), number(active), f"{mean(ranks):.1f}", number(mean(used))]


def _of_drift(record: Mapping[str, Any] | None) -> list[str]:
    """The cells drift and update, from what `sparse-cl drift` writes; None: of the base."""
    if record is None:
        return [number(None), number(None)]
    cka = mean_of_known(layer["cka"] for layer in record["drift"]["layers"].values())
    spread = mean_of_known(mlp["share90"] for mlp in record["smearing"]["mlps"].values())
    return [number(None if cka is None else 1 - cka), number(spread)]


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
