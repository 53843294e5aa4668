"""The protection of ElasticAdamW and SubspaceProjectedAdamW behind any optimizer, as a hook after its step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_cl.layout import whole
from sparse_cl.reference.precision import full_precision
from sparse_cl.subspace import SubspaceMemory

from .elastic_adamw import ROW_STRENGTH, drifts, projection_of, rule_of
from .leaf import owner_of, weight_of
from .low_rank import FittedLowRank, LowRankCorrection
from .memory_adamw import Bases, check_every, guards, known_of, news_of, warn_of_others, warn_of_rest
from .names import FSDP2, Groups, label_of, parameters_of, plain_optimizer, refuse_flattened
from .plan import scalar_on
from .projection import Layer
from .sparse_masked_adamw import SparseMaskedAdamW
from .whole_state import gathered, rows_held, split_rows

_ROUNDED = 1 << 24
"""Entries that are rounded at a time."""


class Protection:
    """What :func:`protect` returns: in force until :meth:`remove`.

    Attributes:
        every: corrects each so many steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        memory: SubspaceMemory | Bases,
        fitted: Mapping[Tensor, FittedLowRank],
        every: int,
        seed: int,
        with_rows: bool,
    ) -> None:
        self.every, self._steps = every, 0
        self._memory, self._with_rows, self._version = memory, with_rows, getattr(memory, "version", None)
        self._own = set(map(id, parameters_of(optimizer.param_groups)))
        #: Whether a step has begun that is not counted yet; whether what is unprotected is still to be said.
        self._begun, self._news = False, True
        self._told: set[str] = set()
        #: By parameter how often it had been written when the last step was done.
        self._written: dict[Tensor, int] = {}
        self._fitted = dict(fitted)
        #: Σ of the learning rate since the last correction.
        self._rates: dict[Tensor, float | Tensor] = dict.fromkeys(fitted, 0.0)
        self._names = {p: label_of(optimizer.param_groups, p) for p in fitted}
        self._generators: dict[torch.device, torch.Generator] = {}
        self._seed = seed
        #: By parameter W₀ U and, of an embedding, its used rows at the start; and the energies of old outputs.
        self._kept = {p: fit.begin(weight_of(p), _wide(p)) for p, fit in fitted.items()}
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        guards.add(self)

    @property
    def steps(self) -> int:
        """How many steps of the optimizer it has seen."""
        return self._steps

    @property
    def memory(self) -> SubspaceMemory | Bases | None:
        """The memory, while the protection is in force."""
        return self._memory if self._handles else None

    def stepped(self) -> set[int]:
        """The identities of the optimizer's parameters."""
        return self._own

    def remove(self) -> None:
        """Takes the protection away; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self, gather: bool = False) -> dict[str, Any]:
        """By parameter W₀ U, the energy of old outputs and Σ lr since the last correction; the number of steps, and the
        generators of rounding.

        Args:
            gather: of weights that are split over processes, give ordinary tensors on the CPU, in all of them; else
                what ``torch.distributed.checkpoint`` saves.
        """
        generators = {str(device): generator.get_state() for device, generator in self._generators.items()}
        tensors = {self._names[p]: {**self._whole(p, gather), "path": self._rates[p]} for p in self._kept}
        return {"parameters": tensors, "steps": self._steps, "generators": generators}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint of the same domain.

        Raises:
            ValueError: other parameters or shapes; nothing is changed then.
        """
        given = {name: dict(kept) for name, kept in state["parameters"].items()}
        for param, name in self._names.items():
            piece = self._fitted[param].piece
            if piece is not None:
                table = self._fitted[param].table
                own = {"origin_rows": table.own} if table is not None else {}
                parts = given.get(name, {}).items()
                given[name] = {k: rows_held(f"state: {name}: {k}", v, piece, own.get(k)) for k, v in parts}
            for key, tensor in self._kept[param].items():
                found = tuple(given[name][key].shape) if key in given.get(name, {}) else "none"
                if found != tuple(tensor.shape):
                    raise ValueError(
                        f"state: {name}: expected {key} of shape {tuple(tensor.shape)}, got {found}; is it another "
                        "memory's?"
                    )
        for param, name in self._names.items():
            for key, tensor in self._kept[param].items():
                tensor.copy_(given[name][key])
            self._rates[param] = given[name].get("path", 0.0)
        self._steps = state["steps"]
        for device, generator in state.get("generators", {}).items():
            self._generators[torch.device(device)] = torch.Generator(device)
            self._generators[torch.device(device)].set_state(generator.cpu())

    def _whole(self, param: Tensor, gather: bool) -> dict[str, Tensor]:
        kept, piece = self._kept[param], self._fitted[param].piece
        if piece is None:
            return kept
        rows = split_rows({k: v for k, v in kept.items() if v.dim()}, piece)
        return kept | ({k: gathered(v, piece.mesh) for k, v in rows.items()} if gather else rows)

    @torch.no_grad()
    def old_output_drift(self) -> dict[str, float]:
        """As :meth:`ElasticAdamW.old_output_drift`."""
        found: dict[str, float] = {}
        for param, fit in self._fitted.items():
            found |= drifts(self._names[param], fit, weight_of(param), self._kept[param])
        return found

    def moved_since(self) -> list[str]:
        """Names of the weights that something else has written since the last step."""
        return [self._names[p] for p, written in self._written.items() if weight_of(p)._version != written]

    @torch._disable_dynamo
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        _refuse_uncorrectable(optimizer)  # masks can be set, and rates taken away, since
        groups = optimizer.param_groups
        own = set(map(id, parameters_of(groups)))
        lost = [self._names[param] for param in self._fitted if id(param) not in own]
        if lost:
            raise RuntimeError(
                f"protect: the optimizer steps other tensors than the model's: {lost[0]} is not among its parameters "
                "any more, and nothing would be protected. ZeRO, FSDP1 and fp16 wrappers flatten or copy parameters; "
                f"{FSDP2}"
            )
        refuse_flattened(groups, "protect")
        if moved := [param for param in self._fitted if not self._fits(param)]:
            raise RuntimeError(
                f"protect: {self._names[moved[0]]} was moved to another device or dtype since; call .remove() of this "
                "protection, and protect(optimizer, memory) once the model is where it is trained"
            )
        if getattr(self._memory, "version", None) != self._version:
            raise RuntimeError(
                "protect: the memory has learned a domain since, or was bound to another model, and this protection "
                "does not follow it; call .remove() of it, and protect(optimizer, memory) again"
            )
        if own != self._own:
            known = known_of(groups, self._memory, self._with_rows)
            if added := [param for param in known if param not in self._fitted]:
                raise RuntimeError(
                    f"protect: parameter {label_of(groups, added[0])} was added to the optimizer since, and would "
                    "not be protected, though the memory knows it; call .remove() of this protection, and "
                    "protect(optimizer, memory) again"
                )
            self._own, self._news = own, True
        self._begun = True
        self._tell(groups)

    def _fits(self, param: Tensor) -> bool:
        """Whether what is kept of it lies where it does, in its dtype."""
        kept = (tensor for tensor in self._kept[param].values() if tensor.dim())
        return all((t.device, t.dtype) == (param.device, _wide(param)) for t in kept)

    def _tell(self, groups: Groups) -> None:
        """Names once what is trained unprotected. A closure makes the gradients after `_before`."""
        if not self._news:
            return
        rest = (p for p in parameters_of(groups) if p.grad is not None and p not in self._fitted)
        warn_of_rest(news_of(rest, self._memory, groups), None, self._told)
        warn_of_others(self, self._told)

    @torch._disable_dynamo
    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # A subclass whose step calls its parent's has the hooks run in both: that is one step, corrected twice.
        counts, self._begun = self._begun, False
        self._steps += counts
        self._tell(optimizer.param_groups)
        self._news = False
        # A GradScaler lets a fused optimizer skip the step by itself.
        found_inf = whole(getattr(optimizer, "found_inf", None))
        for group in optimizer.param_groups if counts else ():
            for param in group["params"]:
                if param in self._fitted and not _is_still(param):
                    skipped = scalar_on(found_inf, param.device)
                    lr = group["lr"] if skipped is None else torch.where(skipped == 0, group["lr"], 0.0)
                    self._rates[param] = self._rates[param] + lr
        if self._steps % self.every == 0:
            self._correct(found_inf)
        self._written = {param: weight_of(param)._version for param in self._fitted}

    def _correct(self, found_inf: Tensor | None) -> None:
        for param, fit in self._fitted.items():
            if _is_still(param) and isinstance(rate := self._rates[param], float) and not rate:
                continue  # the pull would move what was frozen since
            # What earlier steps have moved is corrected, though this one is skipped.
            skipped = scalar_on(found_inf, param.device) if self.every == 1 else None
            update, weight = self._correction(param, fit, skipped), weight_of(param)
            self._rates[param] = 0.0
            if weight.dtype == update.dtype:
                weight.add_(update)
                continue
            if weight.device not in self._generators:
                seed = self._seed + (0 if fit.piece is None else fit.piece.number)
                self._generators[weight.device] = torch.Generator(weight.device).manual_seed(seed)
            for part, change in zip(_pieces(weight), _pieces(update), strict=True):
                part.copy_(_rounded(change.add_(part), part.dtype, self._generators[part.device]))

    def _correction(self, param: Tensor, fit: FittedLowRank, skipped: Tensor | None) -> Tensor:
        """-C Uᵀ; of one layer at a time, so that what is held besides is one layer's."""
        wide = weight_of(param).detach().to(_wide(param))
        layer = Layer(fit, torch.empty_like(wide), self._kept[param], lambda: (wide, wide))
        with full_precision(param.device):
            LowRankCorrection([layer]).correct_(self._rates[param], skipped)
        return layer.update


def protect(
    optimizer: torch.optim.Optimizer,
    memory: SubspaceMemory | Bases,
    *,
    strength: float | None = None,
    budget: float | None = None,
    row_strength: float = ROW_STRENGTH,
    every: int = 1,
    seed: int = 0,
) -> Protection:
    """Lets what earlier domains computed move only as far as you allow, whatever optimizer trains.

    After each step of the optimizer, the weights it knows are corrected as :class:`ElasticAdamW` corrects them, by
    P = W U - W₀ U: the same rules, (m, r) numbers kept for a weight (m, n), and two products more per step. Between the
    optimizer's step and the correction the weights are uncorrected. What the memory does not know is trained as ever;
    the first step names it. Several optimizers of one model want a call each; that step also names what the memory
    knows, has a gradient and is in none of them.

    Weights in bfloat16 or float16 are corrected in float32 and rounded stochastically, so that small corrections are
    right on average; one step's rounding, about 2⁻⁹ or 2⁻¹² of a weight, stays.

    Args:
        optimizer: any ``torch.optim.Optimizer`` that steps the model's own parameters, by its ``step``; accelerate's
            wrapper is looked through.
        memory: as for :class:`ElasticAdamW`. It is not followed: once it has learned a domain, protect anew.
        strength, budget, row_strength: as there; a budget of 0 keeps out altogether.
        every: corrects after each so many steps only; in between a bound may be broken.
        seed: of the stochastic rounding.

    Raises:
        TypeError, ValueError: as there; an optimizer with masks, of the leaf of an ActiveLinear, that is protected,
            that chooses its own rate (lr None), or that keeps another copy of the weights: masters of ours, or an
            average (schedule-free).
        RuntimeError: at a step, if a wrapper has put other tensors in the place of the parameters, one that the memory
            knows was added, the model was moved to another device or dtype, or the memory has learned a domain.
    """
    optimizer = plain_optimizer(optimizer)
    _refuse_uncorrectable(optimizer)
    hooks = optimizer._optimizer_step_post_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), Protection) for hook in hooks):
        raise ValueError("optimizer: it is protected already; call .remove() of that protection first")
    if isinstance(memory, SubspaceMemory) and not memory.domains:
        warnings.warn(
            "memory: it has learned no domain, so nothing is protected; call memory.consolidate() first", stacklevel=2
        )
    every, rule, fitted = check_every(every), rule_of(strength, budget, row_strength), {}
    for param, known in known_of(optimizer.param_groups, memory, row_strength > 0).items():
        if owner_of(param) is not None:
            raise ValueError(
                f"optimizer: parameter {label_of(optimizer.param_groups, param)} is the leaf of an ActiveLinear, which "
                "is written into the weight after the step, over any correction from outside; give ElasticAdamW the "
                "memory"
            )
        try:
            given = projection_of(rule, known)
            given.later = True
            found = given.fitted(param, None)
        except (TypeError, ValueError) as error:
            raise type(error)(f"memory: parameter {label_of(optimizer.param_groups, param)} {error}") from None
        assert isinstance(found, FittedLowRank)
        fitted[param] = found
    return Protection(optimizer, memory, fitted, every, seed, row_strength > 0)


def _refuse_uncorrectable(optimizer: torch.optim.Optimizer) -> None:
    """Raises a ValueError if a correction from outside would break what the optimizer keeps, or be undone by it."""
    kind = type(optimizer).__name__
    if isinstance(optimizer, SparseMaskedAdamW) and optimizer.masks:
        raise ValueError(
            "optimizer: it has masks, which a correction from outside would not keep; give ElasticAdamW the masks and "
            "the memory"
        )
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: {kind} chooses its own learning rate (lr None), which the correction goes "
            "by; give it one (of Adafactor: relative_step=False)"
        )
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ValueError(
            f"optimizer: {kind} keeps an average of the weights, which eval() puts in their place and no correction "
            "reaches; take an optimizer without train() and eval(), such as torch's AdamW with a schedule"
        )
    for group in optimizer.param_groups if isinstance(optimizer, SparseMaskedAdamW) else ():
        if group["master_weights"] and any(p.dtype.itemsize == 2 for p in group["params"]):
            raise ValueError(
                f"optimizer: {kind} writes 16-bit weights from its float32 masters, over any correction from outside; "
                "give ElasticAdamW the memory, or make it with master_weights=False"
            )


def _is_still(param: Tensor) -> bool:
    """No optimizer moves it."""
    return not param.requires_grad and param.grad is None


def _pieces(weight: Tensor) -> Sequence[Tensor]:
    """Its rows, some at a time: rounding takes some ten times what it rounds."""
    return weight.split(max(1, _ROUNDED // max(1, weight.shape[1])))


def _wide(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Up or down to a neighbour in a 16-bit dtype, up with the probability that makes the mean exact."""
    near = values.to(dtype)
    gap = values - near.float()
    other = torch.nextafter(near, torch.where(gap > 0, torch.inf, -torch.inf).to(dtype))
    width = (other.float() - near.float()).abs()
    draw = torch.rand(values.shape, generator=generator, device=values.device)
    return torch.where(draw * width < gap.abs(), other, near)
