"""Forward passes over batches, while probes watch what goes into layers and what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = ("answers", "text", "all")
"""Which tokens count. "answers": those with a label (all of "text" in a batch without labels); "text": all that are
attended to but the first of each sequence, which is the BOS where there is one and draws massive activations even
where there is none; "all": all that are attended to."""

IGNORED = -100
"""The label of a token that the loss leaves out (PyTorch's and transformers' convention)."""

Batch = Mapping[str, Tensor] | Tensor | Sequence[Tensor]
"""What a model is called with: by name (labels are left out), as its one argument, or as several."""


@dataclass(frozen=True)
class Watch:
    """One place to look at in each pass.

    Attributes:
        name: for errors and results.
        module: it must run in every pass.
        side: "input", its first argument, or "output", the first of its outputs.
        see: called with rows (t, width), those of the tokens that count, in the module's dtype; and sequences (t,),
            int64: which sequence of the run each is from, counted from 0. Both on the module's device.
    """

    name: str
    module: nn.Module
    side: str
    see: Callable[[Tensor, Tensor], None]


def stream(model: nn.Module, watches: Sequence[Watch], batches: Iterable[Batch], *, tokens: str = "answers") -> int:
    """Runs the model on every batch, in evaluation mode and without gradients, and returns how many tokens counted.

    A language model computes no logits but each sequence's last, unless its head is watched.

    Raises:
        ValueError: no batch, or none with a token that counts; activations that are not finite; a watched module that
            does not run. Hooks are removed and modes put back whatever happens.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens: expected one of {', '.join(TOKENS)}, got {tokens!r}")
    kept = number = sequences = 0
    rows = _Rows()
    head = head_of(model)
    logits = any(watch.module is head for watch in watches)
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.enter_context(torch.no_grad())
        for watch in watches:
            stack.callback(rows.hook(watch).remove)
        for number, batch in enumerate(batches, 1):
            kept += rows.begin(batch, tokens, sequences)
            sequences += rows.entries
            call(model, batch, logits=logits)
            rows.finish(number, watches)
    if not kept:
        raise ValueError(
            "batches: expected at least one with a token that counts, got "
            + (f"{number} without any (tokens={tokens!r})" if number else "no batch; is the domain empty?")
        )
    return kept


def head_of(model: Any) -> nn.Module | None:
    """The module that computes logits, where the model names it."""
    return getattr(model, "get_output_embeddings", lambda: None)()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; each module's own mode is put back, and what FSDP2 gathered is split again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Has each process hold its own part of what FSDP2 gathered: a pass without gradients leaves the root whole."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()


def call(model: nn.Module, batch: Batch, *, logits: bool = True) -> Any:
    """The model's output on a batch, which is moved to where the model's first parameter is.

    Args:
        logits: False where all but a sequence's last may be left out.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    if not isinstance(batch, Mapping):
        return model(*(part.to(device) for part in batch))
    arguments: dict[str, Any] = {name: part.to(device) for name, part in batch.items() if name != "labels"}
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    if not logits and "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = 1
    return model(**arguments)


def answer_tokens(batch: Batch, tokens: str) -> Tensor | None:
    """Which tokens of a batch count, (batch, length) bool (see `TOKENS`); None where it has no tokens: all rows do."""
    if not isinstance(batch, Mapping) or not ("input_ids" in batch or "attention_mask" in batch):
        return None
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    if tokens == "all":
        return mask
    mask = mask & (mask.cumsum(1) > 1)
    return mask & (batch["labels"] != IGNORED) if tokens == "answers" and "labels" in batch else mask


class Halves:
    """Row numbers of the even and of the odd sequences, found once per batch rather than once per layer."""

    def __init__(self) -> None:
        self._sequences: Tensor | None = None
        self._split: tuple[Tensor, Tensor] | None = None

    def of(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        if self._split is None or self._sequences is not sequences:
            odd = sequences % 2 == 1
            self._sequences, self._split = sequences, ((~odd).nonzero().flatten(), odd.nonzero().flatten())
        return self._split


class _Rows:
    """What counts of the batch that is passing, handed to the watches."""

    def __init__(self) -> None:
        self.entries = 0
        self._first = 0
        # Of a batch with tokens: how many there are, indices of those that count, and the sequence of each.
        self._counted: tuple[int, Tensor, Tensor] | None = None
        self._sums: dict[str, Tensor] = {}
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def begin(self, batch: Batch, tokens: str, first: int) -> int:
        """Takes in a batch whose first sequence is number `first`; how many of its tokens count, as far as is known."""
        self._first, self._sums, self._on_device = first, {}, {}
        mask = answer_tokens(batch, tokens)
        if mask is None:
            parts = batch.values() if isinstance(batch, Mapping) else batch
            part = parts if isinstance(parts, Tensor) else next(iter(parts))
            self.entries, self._counted = len(part), None
            return part.shape[:-1].numel() if part.is_floating_point() else part.numel()
        index = mask.flatten().nonzero().flatten()
        self.entries, self._counted = len(mask), (mask.numel(), index, first + index // mask.shape[1])
        return len(index)

    def hook(self, watch: Watch) -> Any:
        if watch.side not in ("input", "output"):
            raise ValueError(f"side of {watch.name}: expected 'input' or 'output', got {watch.side!r}")
        if watch.side == "output":
            return watch.module.register_forward_hook(lambda _, __, output: self._show(watch, output))
        return watch.module.register_forward_pre_hook(
            lambda _, args, named: self._show(watch, args or next(iter(named.values()))), with_kwargs=True
        )

    def _show(self, watch: Watch, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        rows = value.reshape(-1, value.shape[-1])
        if self._counted is None:
            each = max(1, len(rows) // max(1, self.entries))
            sequences = self._first + torch.arange(len(rows), device=rows.device) // each
        else:
            total, *found = self._counted
            if len(rows) != total:
                raise ValueError(
                    f"{watch.name} has {len(rows)} rows for the {total} tokens of a batch; "
                    "watch modules that see every token"
                )
            if rows.device not in self._on_device:
                self._on_device[rows.device] = (found[0].to(rows.device), found[1].to(rows.device))
            index, sequences = self._on_device[rows.device]
            rows = rows if len(index) == len(rows) else rows[index]
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        self._sums[watch.name] = self._sums.get(watch.name, 0) + rows.sum(dtype=wide)
        watch.see(rows, sequences)

    def finish(self, number: int, watches: Sequence[Watch]) -> None:
        """After the pass of batch `number`: whether all watched ran, on finite numbers."""
        for watch in watches:
            if watch.name not in self._sums:
                raise ValueError(
                    f"{watch.name} ({type(watch.module).__name__}) did not run in batch {number}; "
                    "watch modules that run in every forward pass"
                )
        if not watches:
            return
        # One transfer per batch, not one per layer.
        device = next(iter(self._sums.values())).device
        sums = torch.stack([total.to(device, torch.float64) for total in self._sums.values()])
        if not sums.isfinite().all():
            broken = list(self._sums)[int((~sums.isfinite()).nonzero()[0])]
            raise ValueError(
                f"activations that are not finite in {broken}, batch {number}; look at that batch, and at the model's "
                "weights and dtype (float16 overflows where bfloat16 does not)"
            )
