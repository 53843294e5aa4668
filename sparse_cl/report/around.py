"""Probes around a run: of the base model before it, of each method's model after it, and of the drift between."""

from __future__ import annotations

from pathlib import Path

from sparse_cl.four_domains.data import load_domains
from sparse_cl.four_domains.embedded_model import embedded_model_folder
from sparse_cl.four_domains.settings import Settings
from sparse_cl.models.loading import load_model

from .checkpoints import load_checkpoint
from .comparison import comparison
from .drift import drift_study
from .probe_study import study_model
from .settings import DriftSettings, ProbeSettings

FOLDER = "probes"


def probe_run(settings: Settings, out: Path) -> list[str]:
    """Reports on a finished run, in `out/probes`, and a table of them. Reports that are there are kept.

    Args:
        settings: of the run.
        out: its folder.
    """
    source = settings.model or str(embedded_model_folder())
    domains = load_domains(settings.domains, settings.data, settings.seed)
    same = {name: getattr(settings, name) for name in ("data", "domains", "batch_size", "max_length", "seed")}
    probes = ProbeSettings(() if settings.model is None else (settings.model,), **same)
    for name in ("base", *settings.methods):
        folder = out / FOLDER / name
        if not (folder / "results.json").is_file():
            model, tokenizer = load_model(source)
            if name != "base":
                model = load_checkpoint(str(out / name), model)
            study_model(model, tokenizer, name, domains, probes, folder)
        folder = out / FOLDER / f"{name}-drift"
        if name != "base" and not (folder / "results.json").is_file():
            drift_study(DriftSettings(source, str(out / name), settings.reference, **same), folder)
    table = comparison(
        {name: out / FOLDER / name for name in ("base", *settings.methods)},
        {name: out / FOLDER / f"{name}-drift" for name in settings.methods},
    )
    (out / FOLDER / "comparison.txt").write_text(table + "\n", encoding="utf-8")
    return [table, "", f"Written to {out / FOLDER}: comparison.txt, and report.html of each model and of each drift"]
