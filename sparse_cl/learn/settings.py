"""What `sparse-cl learn` is told to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal

from sparse_cl.arguments import check_options, convert, option
from sparse_cl.data import parse_columns
from sparse_cl.four_domains.method_options import parse_set
from sparse_cl.methods import METHODS, Method, method_named
from sparse_cl.methods.adamw import AdamW
from sparse_cl.methods.elastic import Elastic, ElasticLoRA
from sparse_cl.methods.lora import LoRA
from sparse_cl.methods.memory_method import MemoryMethod
from sparse_cl.methods.options import check_above_zero
from sparse_cl.methods.orthogonal import Orthogonal, OrthogonalLoRA

FULL_LR, ADAPTER_LR = 2e-5, 2e-4
"""Peak rates for models of today's sizes: of all weights, and of adapters."""
OWN = "settings of the method"
SELF, NONE = "self", "none"
_REMEMBERING = tuple(name for name, known in METHODS.items() if issubclass(known, MemoryMethod))
_METHODS = (*_REMEMBERING, AdamW.name, LoRA.name)
_STREAMED = (Elastic.name, Orthogonal.name)
_SHARDED_ADAPTERS = (ElasticLoRA.name, OrthogonalLoRA.name, LoRA.name)
_SHARDED = (Elastic.name, Orthogonal.name, AdamW.name, *_SHARDED_ADAPTERS)


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """Settings of `sparse-cl learn`; two calls with equal settings on equal data are the same."""

    model: str = option(
        MISSING, "causal language model, or what an earlier call left: a folder or a name on the Hub", metavar="MODEL"
    )
    data: tuple[str, ...] = option(
        MISSING,
        "records to learn: files (JSONL, JSON, CSV, Parquet), folders, globs, or data sets of the Hub, NAME[:CONFIG]",
        nargs="+",
        metavar="DATA",
    )
    out: Path = option(MISSING, "new folder for the model", metavar="DIR")
    method: str = option("elastic", "how it is learned: " + ", ".join(_METHODS), metavar="NAME")
    set: tuple[str, ...] = option(
        (), "an option of the method, as strength=10; may be repeated", nargs="+", metavar="OPTION=VALUE", group=OWN
    )
    lr: float | None = option(
        None, f"peak learning rate (default: {ADAPTER_LR:g} for adapters, else {FULL_LR:g})", metavar="X"
    )
    epochs: float = option(1.0, "passes over the records", metavar="X")
    steps: int | None = option(None, "optimizer steps, in place of epochs", least=1, metavar="N")
    batch_size: int = option(8, "records per pass, in each process", least=1, metavar="N")
    gradient_accumulation: int = option(1, "passes per optimizer step", least=1, metavar="N")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, a third more time")
    max_length: int = option(512, "tokens of a record", least=16, metavar="N")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "of the weights; in bfloat16 the optimizer keeps float32 copies of those that it trains"
    )
    autocast: Literal["bf16"] | None = option(None, "train under autocast, for float32 weights on a GPU")
    stream: bool = option(
        False, "the records are several domains, one after the other: find where one ends, and remember each"
    )
    columns: tuple[str, ...] = option(
        (), "what the records call their fields, as prompt=question,response=answer", metavar="FIELD=COLUMN,…"
    )
    eval: str | None = option(
        None, "records to score before and after (default: 5 % of the data, which are held out)", metavar="DATA"
    )
    protect: str = option(
        SELF,
        "what the base model must not forget, before the first domain: self, texts that it writes; a file of plain "
        "text; or none",
        metavar="self|FILE.txt|none",
    )
    texts: int = option(256, "texts that it writes for --protect self", least=1, metavar="N")
    report_to: str = option("none", "where losses are logged as well", metavar="none|tensorboard|wandb|…")
    trainer: tuple[str, ...] = option(
        (), "further arguments of transformers' TrainingArguments", nargs="+", metavar="NAME=VALUE"
    )
    shard: bool = option(False, "split the model over the processes that torchrun started (FSDP2)")
    merge: bool = option(False, "write one plain model where the method trains an adapter")
    show_data: bool = option(False, "show what would be learned, and stop")
    seed: int = option(0, "of everything random", least=0, metavar="N")

    def __post_init__(self) -> None:
        check_options(self)
        check_above_zero("epochs", self.epochs)
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"lr: expected a rate above 0, got {self.lr}")
        parse_columns(self.columns)
        self.make_method()
        if self.shard and self.method not in _SHARDED:
            raise ValueError(
                f"shard: {self.method} has not been made to learn a model that is split over processes; take "
                f"--method {' or '.join(_SHARDED)}, or learn in one process, without --shard"
            )
        if self.shard and self.merge and self.method in _SHARDED_ADAPTERS:
            raise ValueError(
                "merge: no process holds the whole model that an adapter would be merged into; leave --merge out, and "
                "merge the adapter afterwards (merge_and_unload)"
            )
        given = self.training_arguments()
        if self.stream:
            self._check_stream(given)

    def _check_stream(self, given: dict[str, Any]) -> None:
        if self.method not in _STREAMED:
            raise ValueError(
                f"stream: {self.method} cannot begin a domain while it trains; take --method {' or '.join(_STREAMED)}, "
                "or give each domain a call of its own"
            )
        if self.shard:
            raise ValueError("stream: processes would see different batches; leave --shard out")
        if self.epochs > 1:
            raise ValueError(
                f"epochs: expected at most one pass over a stream, got {self.epochs}; a second one would count as "
                "further domains"
            )
        if "train_sampling_strategy" in given:
            raise ValueError("trainer: train_sampling_strategy would mix the domains of --stream; leave it out")

    def make_method(self) -> Method:
        """A fresh instance of the method.

        Raises:
            ValueError: there is no such method, or it has not this option.
        """
        method = method_named(self.method)
        if not issubclass(method, MemoryMethod) and method not in (AdamW, LoRA):
            raise ValueError(
                f"method: {self.method} needs what `sparse-cl run` keeps of a whole sequence; expected one that goes "
                f"on from a model's memory, {', '.join(_REMEMBERING)}, or that protects nothing, {AdamW.name}, "
                f"{LoRA.name}"
            )
        given = parse_set([entry if "=" not in entry else f"{self.method}.{entry}" for entry in self.set])
        return method(**given.get(self.method, {}))

    def training_arguments(self) -> dict[str, Any]:
        """What `trainer` says, typed as `TrainingArguments` has it.

        Raises:
            ValueError: it has no such argument, or one that has an option of its own here.
        """
        import transformers
        from transformers.integrations import get_available_reporting_integrations

        reporters = ("none", "all", *get_available_reporting_integrations())
        if self.report_to not in reporters:
            raise ValueError(
                f"report_to: expected one that is installed, {', '.join(reporters)}, got {self.report_to!r}; install "
                "its package first"
            )
        known = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}
        found: dict[str, Any] = {}
        for name, text in _pairs(self.trainer, "trainer").items():
            if name not in known:
                raise ValueError(f"trainer: TrainingArguments has no {name!r}")
            if name in _OURS:
                raise ValueError(f"trainer: {name} is {_OURS[name]} here")
            found[name] = convert(text, (type(None), bool, int, float, str))
        try:
            if found:  # before hours of other work
                transformers.TrainingArguments(output_dir="none", **found)
        except Exception as error:  # whatever its checks raise
            raise ValueError(f"trainer: TrainingArguments refuses {' '.join(self.trainer)}: {error}") from error
        return found

    def rate(self, adapters: bool) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else ADAPTER_LR if adapters else FULL_LR

    def to_json(self) -> dict[str, Any]:
        """As JSON would give it back, without where the result goes."""
        found = dataclasses.asdict(self)
        del found["out"], found["show_data"]
        for name in ("shard", "stream"):  # folders have neither that were written before there was this option
            if not found[name]:
                del found[name]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


_OURS = {
    "output_dir": "--out",
    "learning_rate": "--lr",
    "max_steps": "--steps",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation",
    "gradient_checkpointing": "--gradient-checkpointing",
    "report_to": "--report-to",
    "seed": "--seed",
    "data_seed": "--seed",
    "bf16": "--autocast bf16",
    "optim": "--method",
    "weight_decay": "the method's (--set weight_decay=X, where it has one)",
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules"), "the method's"),
    **dict.fromkeys(("save_only_model", "ignore_data_skip"), "refused: a call that was stopped would go on otherwise"),
    **dict.fromkeys(("eval_strategy", "load_best_model_at_end"), "refused: --eval scores before and after"),
    **dict.fromkeys(("fsdp", "fsdp_config"), "--shard"),
    "deepspeed": "refused: the methods do not work on what it flattens; take --shard",
    "fp16": "refused: float16 has no place in the methods",
    "resume_from_checkpoint": "done by giving the same command again",
}
"""Arguments of the Trainer that have an option, and which."""


def _pairs(entries: Sequence[str], name: str) -> dict[str, str]:
    """{left: right} of entries `left=right`.

    Raises:
        ValueError: an entry of another form, or one that is given twice.
    """
    found: dict[str, str] = {}
    for entry in entries:
        left, equals, right = (part.strip() for part in entry.partition("="))
        if not (left and equals and right):
            raise ValueError(f"{name}: expected NAME=VALUE, got {entry!r}")
        if left in found:
            raise ValueError(f"{name}: {left} is given twice")
        found[left] = right
    return found
