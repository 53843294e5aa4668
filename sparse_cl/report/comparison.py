"""Models that were probed, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from sparse_cl.four_domains.report import number, text_table

from .summary import mean_of_known, numbers

LEGEND = """\
overlap  IoU of the top 5 % of the neurons, mean over pairs of domains and layers
cosine   of domains' gradients, mean over pairs and layers
active   share of the neurons that holds 99 % of a token's L1 mass
rank     effective rank of the hidden states, mean over domains and layers
used     share of the input directions that the domains use, mean over layers
drift    1 - CKA of the hidden states on the reference text, mean over layers
update   share of an MLP's neurons that holds 90 % of the update, mean over MLPs
Nulls, ceilings and intervals are in the reports."""


def comparison(probes: Mapping[str, Path], drifts: Mapping[str, Path]) -> str:
    """A table, a row a model, from the results.json of reports.

    Args:
        probes: name → folder of `sparse-cl probe`.
        drifts: name → folder of `sparse-cl drift` from the base; some of the names.
    """
    rows = []
    for name, folder in probes.items():
        record = _read(folder)
        drift = _read(drifts[name]) if name in drifts else None
        found: dict[str, Any] = numbers(record)
        ranks = [layer["effective_rank"] for part in record["rank"].values() for layer in part["layers"].values()]
        used = [layer["used"][-1] / layer["width"] for layer in record["capacity"]["layers"].values()]
        cka = mean_of_known(layer["cka"] for layer in drift["drift"]["layers"].values()) if drift else None
        spread = mean_of_known(mlp["share90"] for mlp in drift["smearing"]["mlps"].values()) if drift else None
        known = [
            found["overlap"] and found["overlap"]["iou"],
            found["cosine"] and found["cosine"]["mean"],
            found["sparsity"]["needed"],
        ]
        cells = [*map(number, known), f"{mean(ranks):.1f}", number(mean(used))]
        rows.append((name, *cells, number(None if cka is None else 1 - cka), number(spread)))
    header = ("model", *(line.split()[0] for line in LEGEND.splitlines()[:-1]))
    return f"{text_table(header, rows)}\n{LEGEND}"


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
