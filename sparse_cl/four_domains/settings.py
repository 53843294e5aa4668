"""What a run is told to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from sparse_cl.arguments import check_options, option
from sparse_cl.methods import METHODS, Method, method_named
from sparse_cl.methods.registry import elsewhere

from .domains import COLUMNS_HELP, DATA_HELP, DOMAINS_HELP, default_domains
from .evaluate import METRICS
from .method_options import check_option

KINDS = {"ours": "ours", "baselines": "baseline", "bounds": "bound"}
"""Words for all methods of a kind, and the kind."""
GIVEN, REVERSE = "given", "reverse"
"""Orders of the domains; others are their names with + between them."""


def methods_named(entries: Sequence[str]) -> tuple[str, ...]:
    """Names of methods, each once, from names and the words "all", "ours", "baselines" and "bounds".

    Raises:
        ValueError: there is no method of that kind here.
    """
    chosen: dict[str, None] = {}
    for entry in entries:
        found = [name for name, method in METHODS.items() if entry == "all" or method.kind == KINDS.get(entry)]
        if entry in KINDS and not found:
            raise ValueError(f"{entry}: there is no such method here{elsewhere()}")
        chosen |= dict.fromkeys(found or [entry])
    return tuple(chosen)


@dataclass(frozen=True)
class Settings:
    """Settings of `sparse-cl run`; two runs with equal settings are the same run.

    Attributes that are no options themselves:
        methods: names in `METHODS`.
        lr: peak learning rate by method; a method that is not in it takes its default.
        options: settings of the methods' own by name (`Method.options`); each goes to the methods that take it.
        method_options: method → settings of its own; they go before `options`.
        seed: of everything random.
    """

    model: str | None = option(
        None, "causal language model: a folder or a name on the Hub (default: embedded)", metavar="PATH_OR_HUB_NAME"
    )
    data: str | None = option(
        None,
        DATA_HELP + " (default: embedded)",
        metavar="PATH_OR_HUB_NAME",
    )
    domains: tuple[str, ...] = option((), DOMAINS_HELP, metavar="NAME[,NAME…]")
    columns: tuple[str, ...] = option((), COLUMNS_HELP, metavar="FIELD=COLUMN[,…]")
    methods: tuple[str, ...] = field(default_factory=lambda: tuple(METHODS))
    reference: str | None = option(
        None,
        "plain text that the base model knows, scored as well (default: none; with the embedded model its own "
        "pretraining text, held out)",
        metavar="FILE.txt",
    )
    steps: int = option(150, "optimizer steps per domain", least=1, metavar="N")
    batch_size: int = option(16, "records per step and device", least=1, metavar="N")
    max_length: int = option(256, "tokens of prompt and response together", least=16, metavar="N")
    lr: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    eval_records: int = option(
        64, "first records of each kind and domain that are scored: test, choices, answers", least=1, metavar="N"
    )
    options: Mapping[str, Any] = field(default_factory=dict)
    method_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    autocast: Literal["bf16"] | None = option(
        None, "train under autocast; scoring and probes stay in float32 (default: off)"
    )
    split: Literal["test", "validation"] = option(
        "test",
        "records that are scored; validation (held out of training, bits per byte alone) to choose settings by",
    )
    protect: str | None = option(
        None,
        "plain text whose knowledge the methods that protect are to keep; not the text that is scored. The others run "
        "without it, and the report says so",
        metavar="FILE.txt|embedded",
    )
    score: Literal["all", "learned"] = option(
        "all",
        "after each domain: all of them, or only those learned so far, in half the time; then there is no fwt, and "
        "forgetting is from the best of what was scored",
    )
    metrics: tuple[str, ...] = option(METRICS, "to leave out slow ones; bits_per_byte always", metavar="NAME[,NAME…]")

    def __post_init__(self) -> None:
        check_options(self)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be named, each once; got {list(self.methods)}")
        for name in (*self.methods, *self.lr):
            method_named(name, "all", *KINDS)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and below 2**32, got {self.seed}")
        for name, lr in self.lr.items():
            if not 0 < lr < float("inf"):
                raise ValueError(f"the learning rate must be positive, got {lr} for {name}")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"metrics: unknown {', '.join(unknown)}; there are {', '.join(METRICS)}")
        if METRICS[0] not in self.metrics:
            raise ValueError(f"metrics: {METRICS[0]} is what all is compared by; got only {', '.join(self.metrics)}")
        for name, options in self.method_options.items():
            if name not in self.methods:
                raise ValueError(f"options are set for {name}, which this run has not: {', '.join(self.methods)}")
            for own in options:
                check_option(name, own)
        for common in self.options:
            if not any(common in METHODS[name].options for name in self.methods):
                taking = [name for name, method in METHODS.items() if common in method.options]
                raise ValueError(
                    f"{common} is set, but no method of this run takes it: {', '.join(self.methods)}. "
                    + (f"Leave it out, or run {' or '.join(taking)}" if taking else "No method does")
                )
        for name in self.methods:
            self.make_method(name)
        # Kept as names: what is compared with another run is what was learned, not how it was asked for.
        object.__setattr__(self, "domains", self.domains or default_domains(self.data))

    def arranged(self, order: str, seed: int) -> Settings:
        """These with the domains in another order, and a seed.

        Args:
            order: "given", "reverse", or the names with + between them.

        Raises:
            ValueError: names that are not those of the domains, each once.
        """
        domains = {entry.partition("=")[0]: entry for entry in self.domains}
        names = {GIVEN: list(domains), REVERSE: [*reversed(domains)]}.get(order, order.split("+"))
        if sorted(names) != sorted(domains):
            raise ValueError(f"--order {order}: expected {GIVEN}, {REVERSE}, or all of {'+'.join(domains)} in an order")
        return replace(self, domains=tuple(domains[name] for name in names), seed=seed)

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
        known = asdict(self)
        # As settings were before there were these.
        if not self.columns:
            del known["columns"]
        if self.score == "all":
            del known["score"]
        return {
            **known,
            "domains": list(self.domains),
            "methods": list(self.methods),
            "lr": {name: self.lr_of(name) for name in self.methods},
            "options": dict(self.options),
            "method_options": {name: dict(options) for name, options in self.method_options.items()},
            "metrics": [name for name in METRICS if name in self.metrics],
        }
