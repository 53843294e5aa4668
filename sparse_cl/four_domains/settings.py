"""What a run is told to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sparse_cl.methods import METHODS, Method

from .data import DEFAULT_DOMAINS
from .evaluate import METRICS
from .method_options import known_options

KINDS = {"ours": "ours", "baselines": "baseline", "bounds": "bound"}
"""Words for all methods of a kind, and the kind."""
SPLITS = ("test", "validation")
AUTOCASTS = ("bf16",)


def methods_named(entries: Sequence[str]) -> tuple[str, ...]:
    """Names of methods, each once, from names and the words "all", "ours", "baselines" and "bounds"."""
    chosen: dict[str, None] = {}
    for entry in entries:
        if entry == "all":
            chosen |= dict.fromkeys(METHODS)
        elif entry in KINDS:
            chosen |= dict.fromkeys(name for name, method in METHODS.items() if method.kind == KINDS[entry])
        elif entry in chosen and entry in METHODS:
            continue
        else:
            chosen[entry] = None
    return tuple(chosen)


@dataclass(frozen=True)
class Settings:
    """Settings of `sparse-cl run`; two runs with equal settings are the same run.

    Attributes:
        model: folder or Hub name of a causal language model; None: the embedded one.
        data: see `data.load_domains`; None: the embedded domains.
        domains: in training order.
        methods: names in `METHODS`.
        reference: file of plain text whose bits per byte are measured too; None: with the embedded model its own
            pretraining text, held out; else none.
        steps: optimizer steps a domain.
        batch_size: per device.
        max_length: tokens of prompt and response together.
        lr: peak learning rate by method; a method that is not in it takes its default.
        seed: of everything random.
        eval_records: records of each kind and domain that are scored, the first ones.
        options: settings of the methods' own by name (`Method.options`); each goes to the methods that take it.
        method_options: method → settings of its own; they go before `options`.
        autocast: None, or "bf16": training under autocast. Scoring and probes stay in float32.
        split: which records are scored: "test", or "validation" (held out of training) to choose settings by.
        protect: file of plain text whose knowledge the methods that protect are to keep, or "embedded"; not the text
            that is scored.
        metrics: what is scored, of `evaluate.METRICS`; bits per byte always.
    """

    model: str | None = None
    data: str | None = None
    domains: tuple[str, ...] = DEFAULT_DOMAINS
    methods: tuple[str, ...] = tuple(METHODS)
    reference: str | None = None
    steps: int = 150
    batch_size: int = 16
    max_length: int = 256
    lr: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    eval_records: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)
    method_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    autocast: str | None = None
    split: str = "test"
    protect: str | None = None
    metrics: tuple[str, ...] = METRICS

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_records"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length < 16:
            raise ValueError(f"max_length must be at least 16 tokens, got {self.max_length}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be named, each once; got {list(self.methods)}")
        for name in (*self.methods, *self.lr):
            if name not in METHODS:
                words = ", ".join(("all", *KINDS))
                raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}; or {words}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and below 2**32, got {self.seed}")
        for name, lr in self.lr.items():
            if not 0 < lr < float("inf"):
                raise ValueError(f"the learning rate must be positive, got {lr} for {name}")

        if self.autocast not in (None, *AUTOCASTS):
            raise ValueError(f"autocast: expected {' or '.join(AUTOCASTS)}, or none, got {self.autocast!r}")
        if self.split not in SPLITS:
            raise ValueError(f"split: expected {' or '.join(SPLITS)}, got {self.split!r}")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"metrics: unknown {', '.join(unknown)}; there are {', '.join(METRICS)}")
        if METRICS[0] not in self.metrics:
            raise ValueError(f"metrics: {METRICS[0]} is what all is compared by; got only {', '.join(self.metrics)}")
        for name, options in self.method_options.items():
            if name not in self.methods:
                raise ValueError(f"options are set for {name}, which this run has not: {', '.join(self.methods)}")
            if unknown := [option for option in options if option not in METHODS[name].options]:
                raise ValueError(f"{name} has no option {unknown[0]!r}; it has: {known_options(METHODS[name])}")
        for option in self.options:
            if not any(option in METHODS[name].options for name in self.methods):
                taking = [name for name, method in METHODS.items() if option in method.options]
                raise ValueError(
                    f"{option} is set, but no method of this run takes it: {', '.join(self.methods)}. "
                    + (f"Leave it out, or run {' or '.join(taking)}" if taking else "No method does")
                )
        for name in self.methods:
            self.make_method(name)

    def make_method(self, name: str) -> Method:
        """A fresh instance of a method, with those of `options` that it takes and its own."""
        method = METHODS[name]
        common = {option: value for option, value in self.options.items() if option in method.options}
        return method(**{**common, **self.method_options.get(name, {})})

    def lr_of(self, method: str) -> float:
        """The peak learning rate of a method."""
        return self.lr.get(method, METHODS[method].default_lr)

    def to_json(self) -> dict[str, Any]:
        """As JSON would give it back."""
        return {
            **asdict(self),
            "domains": list(self.domains),
            "methods": list(self.methods),
            "lr": {name: self.lr_of(name) for name in self.methods},
            "options": dict(self.options),
            "method_options": {name: dict(options) for name, options in self.method_options.items()},
            "metrics": [name for name in METRICS if name in self.metrics],
        }
