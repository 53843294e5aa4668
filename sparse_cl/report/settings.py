"""What `sparse-cl probe` and `sparse-cl drift` are told to do."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

from sparse_cl.arguments import check_options, option
from sparse_cl.four_domains.domains import COLUMNS_HELP, DOMAINS_HELP, default_domains
from sparse_cl.methods.options import check_share

PROBES = ("activation", "gradients", "curvature", "rank", "capacity")
"""What can be asked for. "activation": sparsity, overlap, hubs and dormant neurons; "gradients": cosines, angles and
interference."""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """How records are read, and by a model of which dtype."""

    records: int = option(128, "of each domain, the first ones", least=1, metavar="N")
    batch_size: int = option(16, "records per pass", least=1, metavar="N")
    max_length: int = option(256, "tokens of prompt and response together", least=16, metavar="N")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the weights; bfloat16 for large models")
    seed: int = option(0, "of everything random", metavar="N")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class ProbeSettings(_Reading):
    """Settings of `sparse-cl probe`: models (none: the embedded one), `data` and `domains` as `data.load_domains` takes
    them, of which training records are used, and `probes`, some of `PROBES`."""

    models: tuple[str, ...] = option(
        (),
        "a causal language model (default: embedded); for several see `python -m benchmarks.arena scale`",
        flag="--model",
        nargs="+",
        metavar="PATH_OR_HUB_NAME",
    )
    data: str | None = option(
        None, "as for `sparse-cl run`; training records are used (default: embedded)", metavar="PATH_OR_HUB_NAME"
    )
    domains: tuple[str, ...] = option((), DOMAINS_HELP, metavar="NAME[,NAME…]")
    columns: tuple[str, ...] = option((), COLUMNS_HELP, metavar="FIELD=COLUMN[,…]")
    probes: tuple[str, ...] = option(PROBES, "what to measure", metavar="NAME[,NAME…]")
    blocks: int = option(
        8,
        "residual blocks, evenly spread, of which gradients, curvature, rank and capacity keep matrices; activations "
        "are seen in all",
        least=1,
        metavar="N",
    )
    energy: float = option(0.95, "share of the inputs' energy that the directions in use explain", metavar="X")
    critical: bool = option(
        False, "also search the sparsity that raises the loss by 1 %: about ten passes more over each domain"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "domains", self.domains or default_domains(self.data))
        check_share("energy", self.energy)
        for name in self.probes:
            if name not in PROBES:
                raise ValueError(f"unknown probe {name!r}; there are {', '.join(PROBES)}")
        if not self.probes:
            raise ValueError(f"probes: expected at least one of {', '.join(PROBES)}, got none")


@dataclass(frozen=True)
class DriftSettings(_Reading):
    """Settings of `sparse-cl drift`. With domains the losses on the line between the checkpoints are measured too, and
    how much of the update falls on hubs (with two domains at least). `after` is what `load_checkpoint` takes."""

    before: str = option(MISSING, "folder or Hub name of a causal language model", flag="before", metavar="BEFORE")
    after: str = option(MISSING, "folder of the same model, trained on", flag="after", metavar="AFTER")
    text: str | None = option(
        None, "plain reference text, of which the beginning is used (default: embedded)", metavar="FILE.txt"
    )
    data: str | None = option(
        None, "as for `sparse-cl run`; validation records are used (default: none)", metavar="PATH_OR_HUB_NAME"
    )
    domains: tuple[str, ...] = option(
        (),
        "as for `sparse-cl run` (default: with --data as there, else none; embedded ones can be named)",
        metavar="NAME[,NAME…]",
    )
    columns: tuple[str, ...] = option((), COLUMNS_HELP, metavar="FIELD=COLUMN[,…]")
    plasticity: bool = option(False, "also fit new random tasks from both (slow)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None:
            object.__setattr__(self, "domains", self.domains or default_domains(self.data))


@dataclass(frozen=True)
class Out:
    """Where a report goes."""

    out: Path = option(MISSING, "new folder for the report", metavar="DIR")
    show_data: bool = option(False, "show what was read, and examples token by token as they are read; then stop")


def check_out(out: Path) -> None:
    """Whether `out` may be a new report's folder.

    Raises:
        ValueError: it is a file, or a folder that is not empty.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out must be a folder")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another --out, or delete it")
