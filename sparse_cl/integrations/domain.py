"""One domain, trained by somebody else's loop and optimizer: what comes before it, behind it and after it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_cl.layout import whole
from sparse_cl.methods import Carried, Elastic, Method, Orthogonal, load_carried, save_carried
from sparse_cl.methods.carried import FOLDER
from sparse_cl.optim import ElasticAdamW
from sparse_cl.optim.active_gradients import active_gradients
from sparse_cl.optim.elastic_adamw import rule_of
from sparse_cl.optim.memory_adamw import MemoryAdamW
from sparse_cl.optim.names import plain_optimizer
from sparse_cl.subspace import SubspaceMemory
from sparse_cl.subspace.layers import plain_name

from .looking import Looking

ADVICE = (
    "Train with the optimizer that steps the model's own parameters, in one process, by DistributedDataParallel or by "
    "FSDP2 (fsdp_version 2): no DeepSpeed, no FSDP1, and no optimizer of another copy of the model"
)

STATE = f"{FOLDER}/protection.safetensors"
"""What a checkpoint in the middle of a domain holds, and no folder of a finished one."""
_PARTS, _ENTRIES = 4, 8
"""Of so many weights so many entries tell one state of a model from another."""


class Domain:
    """A domain that is being learned: its method has looked at the data, and the protection is behind the optimizer.

    Args:
        method: `elastic` or `orthogonal`; it goes on from what it remembers.
        model: the model itself, not a wrapper; of transformers, or of PEFT.
        loader: of training batches, with `input_ids`, `labels` and, where there is padding, `attention_mask`. At most
            `records` of its records are looked at, evenly spaced where its length is known.
        optimizer: what trains the model; wrappers of accelerate are looked through. An `ElasticAdamW` or
            `SubspaceProjectedAdamW` takes the memory itself; masks of ours have gradients clipped by their active norm.
        memory: a model folder whose memory is gone on from, or a name on the Hub.
        records: how many training records the method may look at, before and after.
        resumes: the protection's state, of a checkpoint in the middle of the domain.
        ahead: the loader is looked at when the domain ends, so what cannot be is refused now.

    Raises:
        ValueError: data that can be read once only, or hold no `input_ids`; the method cannot train the model; it needs
            its own optimizer, or would put another memory in the place of the optimizer's; the folder carries no
            memory, or is a checkpoint in the middle of a domain.
        RuntimeError: the optimizer steps other tensors than the model's.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        *,
        memory: str | Path | None = None,
        records: int = 128,
        resumes: Mapping[str, Any] | None = None,
        ahead: bool = True,
    ) -> None:
        self.method, self.model, self.optimizer = method, plain_model(model), plain_optimizer(optimizer)
        self.batches = Looking(loader, self.model, records)
        if ahead:
            self.batches.check()
        self.domains = list(method.history)
        _check_own(self.model, self.optimizer)
        if isinstance(self.optimizer, MemoryAdamW):
            if method.own_optimizer:
                method.guard(self.optimizer)  # refuses
            _check_rule(method, self.optimizer)
        if memory is not None:
            if resumes is None and (Path(memory) / STATE).is_file():
                raise ValueError(
                    f"memory: {memory} is a checkpoint in the middle of a domain, which its memory does not know; give "
                    "the output folder, where the memory is written when training ends"
                )
            carried = load_carried(memory, self.model)
            if carried is None or carried.memory is None:
                raise ValueError(
                    f"memory: {memory} carries none (no sparse_cl/memory.safetensors), so nothing of it would be "
                    "protected; give the folder that a protected training ended in, or, for a first domain, none"
                )
            method.remember(self.model, carried.memory)
            if resumes is None:
                _warn_of_other_weights(self.model, carried, memory)
            self.domains = list(carried.domains)
            method.history = tuple(self.domains)
        if method.before_domain(self.model, self.batches) is not self.model:
            raise ValueError(
                f"method: {method.name} wraps the model, which the optimizer would not follow; take elastic or "
                "orthogonal, on a model of PEFT where adapters are wanted"
            )
        self.protection = None
        if isinstance(self.optimizer, MemoryAdamW):
            state = self.optimizer.state_dict() if resumes is not None else None
            self.optimizer.set_memory(getattr(method, "memory", None) if _remembers(method) else None)
            if state is not None:
                self.optimizer.load_state_dict(state)
        else:
            self.protection = method.guard(self.optimizer)
            if self.protection is not None and resumes is not None:
                try:
                    self.protection.load_state_dict(resumes)
                except ValueError:
                    self.protection.remove()
                    raise
            if self.protection is None and resumes and resumes.get("parameters"):
                raise ValueError(
                    "memory: expected the one that the domain began with, got none: the checkpoint has a protection, "
                    "which would be lost; give memory= the same folder as before"
                )
        self._began = self.protection.steps if self.protection else 0
        self._clipping = active_gradients(self.optimizer)
        self._proven = False

    def prove(self, again: bool = False) -> None:
        """After an optimizer's step: whether the protection was in it. Later calls cost nothing.

        Args:
            again: later calls are proofs too; each comes after a step.

        Raises:
            RuntimeError: it was not.
        """
        if self._proven and not again:
            return
        if self.protection is not None and self.protection.steps == self._began:
            raise RuntimeError(
                f"the optimizer that stepped is not the {type(self.optimizer).__name__} behind which the protection "
                f"is: nothing would be protected. {ADVICE}"
            )
        if self.protection is not None:
            self._began = self.protection.steps
        if not self._proven:
            _check_own(self.model, self.optimizer)
        self._proven = True

    def look_at(self, batches: Iterable[Any], records: int) -> None:
        """Has the method remember the domain by these batches, in place of those of the loader."""
        self.batches = Looking(batches, self.model, records)

    def drift(self) -> dict[str, float]:
        """By parameter the share of old outputs that has moved in this domain; empty: nothing is protected yet."""
        if isinstance(self.optimizer, MemoryAdamW):
            return getattr(self.optimizer, "old_output_drift", dict)()
        return {} if self.protection is None else self.protection.old_output_drift()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of the domain must hold beside model, optimizer and memory."""
        return {} if self.protection is None else self.protection.state_dict(gather=True)

    def carried(self) -> Carried:
        """What the model carries: of the domains that were learned, this one only after `end`."""
        return Carried(getattr(self.method, "memory", None), self.domains)

    def close(self) -> None:
        """Takes protection and clipping away."""
        if self.protection is not None:
            self.protection.remove()
        self._clipping.close()

    def end(self, folder: str | Path | None = None, **facts: Any) -> None:
        """The domain is learned: the method remembers it.

        Args:
            folder: of the model; what it carries is written there. Of several processes, give it to one.
            facts: of the history's entry: at least `name` where a folder is given.
        """
        self.close()
        self.method.after_domain(self.model, self.batches)
        entry = {"method": self.method.name, "options": self.method.settings()}
        if _remembers(self.method):
            facts["weights"] = _weights_of(self.model, self.method.memory)  # type: ignore[attr-defined]
        self.domains = [*self.domains, {"name": "domain", **entry, **facts}]
        self.method.history = tuple(self.domains)
        if folder is not None:
            save_carried(folder, self.carried())


@contextmanager
def continual(
    method: Method, model: nn.Module, loader: Iterable[Any], optimizer: torch.optim.Optimizer, **options: Any
) -> Iterator[Domain]:
    """While it lasts a domain is learned by a loop of your own.

        with continual(Elastic(), model, loader, optimizer, memory="models/1-code") as domain:
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        model.save_pretrained("models/2-clinic")
        save_carried("models/2-clinic", domain.carried())

    What ends in an error is not remembered. Arguments and errors are those of `Domain`.
    """
    domain = Domain(method, model, loader, optimizer, **options)
    proof = domain.optimizer.register_step_post_hook(lambda *_: domain.prove())
    try:
        yield domain
    except BaseException:
        domain.close()
        raise
    finally:
        proof.remove()
    if not domain._proven:
        domain.close()
        raise RuntimeError(
            "the optimizer took no step in the domain, so nothing was learned, or by another optimizer without the "
            f"protection. {ADVICE}"
        )
    if domain.protection is not None and (moved := domain.protection.moved_since()):
        warnings.warn(
            f"{method.name}: {moved[0]} was written after the last step of the optimizer that was given, by another "
            "optimizer or by your loop, and that was not protected; give continual the optimizer that steps, one for "
            "the whole domain",
            stacklevel=3,
        )
    domain.end()


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and data parallel wrappers."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def _remembers(method: Method) -> bool:
    memory = getattr(method, "memory", None)
    return memory is not None and bool(memory.domains)


def _weights_of(model: nn.Module, memory: SubspaceMemory) -> dict[str, list[float]]:
    """A few entries of a few weights that the memory tracks, by which a history knows what it was written beside."""
    parameters = {plain_name(name): param for name, param in model.named_parameters()}
    names = [name for name in memory.names if name in parameters and not memory.is_embedding(name)]
    # Not the last, a head that may grow with the vocabulary.
    chosen = {names[len(names) * part // _PARTS] for part in range(_PARTS)} if names else ()
    found = {}
    for name in sorted(chosen):
        flat = whole(parameters[name].detach()).flatten()
        found[name] = flat[:: max(1, len(flat) // _ENTRIES)][:_ENTRIES].double().tolist()
    return found


def _warn_of_other_weights(model: nn.Module, carried: Carried, folder: str | Path) -> None:
    """Says that a memory is of another state of the model: one that was loaded without what was learned, say."""
    assert carried.memory is not None
    before = carried.domains[-1].get("weights", {}) if carried.domains else {}
    now = _weights_of(model, carried.memory)
    pairs = [pair for name in before.keys() & now.keys() for pair in zip(before[name], now[name], strict=True)]
    # It may have been saved in bfloat16, which keeps 8 bits.
    others = sum(not math.isclose(a, b, rel_tol=2**-8) for a, b in pairs)
    if others > len(pairs) / 2:
        warnings.warn(
            f"memory: {folder} was written beside other weights than the model has now ({others} of {len(pairs)} "
            "entries that were looked at differ), so what was learned there is not in the model; load the model of "
            "that folder",
            stacklevel=4,
        )


def _check_rule(method: Method, optimizer: MemoryAdamW) -> None:
    """The user's optimizer goes by its own rule. Nothing that was asked for of either is dropped silently."""
    kind = type(optimizer).__name__
    if optimizer.protects and (optimizer.memory is None or optimizer.memory is not getattr(method, "memory", None)):
        raise ValueError(
            f"optimizer: this {kind} protects something already, which {method.name} would put its own memory in the "
            "place of; have the method remember that memory (method.remember), or make the optimizer without one"
        )
    rule = optimizer.rule if isinstance(optimizer, ElasticAdamW) else None
    if isinstance(method, Orthogonal) and rule is not None and (rule.kind, rule.number) != ("budget", 0):
        raise ValueError(
            f"optimizer: {kind} lets old outputs move (a {rule.kind} of {rule.number:g}), which {method.name} must "
            "not; take SubspaceProjectedAdamW, or budget=0"
        )
    if isinstance(method, Elastic):
        asked = rule_of(method.strength, None, method.row_strength), method.every
        if (rule, optimizer.every) != asked:
            found = "its projection" if rule is None else f"a {rule.kind} of {rule.number:g}, rows {rule.rows:g}"
            warnings.warn(
                f"{method.name}: the {kind} that was given keeps its own rule ({found}, every {optimizer.every}), not "
                f"the method's ({asked[0].number:g}, rows {asked[0].rows:g}, every {method.every})",
                stacklevel=3,
            )


def _check_own(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = set(map(id, model.parameters()))
    # Compact leaves stand for a weight of the model, and are parameters of a module in it.
    others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]
    if others:
        raise RuntimeError(
            f"the optimizer steps other tensors than the model's: one of shape {tuple(others[0].shape)} is no "
            f"parameter of {type(model).__name__}, so what is protected would not be what is trained. {ADVICE}"
        )
