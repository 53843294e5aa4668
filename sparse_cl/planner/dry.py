"""Running code without computing: tensors that have a shape but no values, and a ledger of the bytes they would take.

Floating-point tensors are fake (`FakeTensorMode`). Small integer and Boolean tensors (token ids, masks, indices) are
real, so that code which chooses by them runs as ever. Where code asks a fake tensor for a value, it gets one that a
healthy run could give: true, a small number above 0, all of what is counted, the first k of what is chosen.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
SMALL = 1 << 20
"""Entries up to which an integer or Boolean tensor is real."""
_GUESS = 1e-5
"""Passes for a count of steps as for a rounding error."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * query.numel() // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(gradient: Tensor, *args: Any, **kwargs: Any) -> int:
    return 5 * _attention(*args) // 2  # the scores again, and gradients of scores, queries, keys and values


_FLOPS = {
    **flop_registry,  # which leaves out attention as it is fused on a CPU
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class DryRun(TorchDispatchMode):
    """The mode of a dry run, to be entered by `dry_run`.

    Args:
        wide_at: tensors whose last dimension is this are counted apart, too: the vocabulary, for logits.
        gpu: whether the device is a GPU, so that what is moved to the CPU is not on it.

    Attributes:
        live, wide: bytes of all storages on the device now, and of those at `wide_at`; wide_peak: most of these.
        peaks: most bytes, by phase. flops: of products so far, as torch's FlopCounterMode counts them.
    """

    def __init__(self, wide_at: int = 0, gpu: bool = False) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.wide_at, self.gpu = wide_at, gpu
        self.live = self.wide = self.wide_peak = self.flops = 0
        self.peaks: dict[str, int] = {}
        self.phase = ""
        self._held: dict[int, tuple[weakref.ref, int]] = {}
        self._host: set[int] = set()
        self._there: dict[int, tuple[weakref.ref, int]] = {}
        self._read: set[int] = set()
        self._written: set[int] = set()

    def begin(self, phase: str) -> None:
        """From now on peaks are those of this phase."""
        self.phase = phase
        self.peaks[phase] = max(self.live, self.peaks.get(phase, 0))

    def bytes_of(self, tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> int:
        """Bytes of the distinct storages of tensors that are on the device, without those of others."""
        left_out = self._host | {_key(x) for x in but}
        return sum({_key(x): x.untyped_storage().nbytes() for x in tensors if _key(x) not in left_out}.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            out = self._guess(func, args, kwargs)
        elif tensors and not any(x.is_meta for x in tensors):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            out = tree_map_only(Tensor, lambda x: x if _is_real(x) else self.fake.from_tensor(x), out)
        else:
            with self.fake:
                out = func(*args, **kwargs)
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            if not tensors and all(_is_real(x) and x.dtype != torch.uint8 for x in made):  # but buffers of state
                with unset_fake_temporarily():
                    out = func(*args, **kwargs)
        if func.overloadpacket in _FLOPS:
            self.flops += _FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
        self._account(func, tensors, args, kwargs, [x for x in tree_leaves(out) if isinstance(x, Tensor)])
        return out

    def _guess(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an op on fake tensors."""
        packet, first = func.overloadpacket, args[0]
        if packet is aten._local_scalar_dense:
            return _filled((), first)
        if packet is aten.equal:
            return True
        if packet is aten.nonzero and first.numel() <= SMALL:
            with unset_fake_temporarily():
                return torch.ones(first.shape, dtype=torch.bool).nonzero()
        with self.fake:
            if packet is aten.nonzero:
                return torch.empty(first.numel(), first.dim(), dtype=torch.int64)
            if packet is aten.bincount:
                return torch.empty(kwargs.get("minlength", 1), dtype=torch.int64)
            if packet in (aten.index, aten.index_put, aten.index_put_):
                args = (first, [part for index in args[1] for part in _places(index)], *args[2:])
            out = func(*args, **kwargs)
        found = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not found or not all(_is_real(x) for x in found if not x.is_floating_point()):
            return out
        with unset_fake_temporarily():
            if packet is aten.sum and not first.is_floating_point():
                return torch.full(out.shape, first.numel() // max(1, out.numel()))
            if packet in (aten.zeros_like, aten.ones_like) and not out.is_floating_point():
                return torch.full(out.shape, int(packet is aten.ones_like), dtype=out.dtype)
            if packet in (aten.topk, aten.sort) and out[1].dim():
                return out[0], torch.arange(out[1].shape[-1]).expand(out[1].shape).contiguous()
            if func.namespace == "sparse_cl" and len(found) > 1:  # ranks: full
                return [torch.full(x.shape, found[0].shape[-1]) if x.dtype == torch.int64 else x for x in found]
        return out

    def _account(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any, made: list[Tensor]) -> None:
        known = [x for x in tensors if isinstance(x, FakeTensor)]
        host = bool(known) and all(_key(x) in self._host for x in known)
        if self.gpu and known and func is aten._to_copy.default and kwargs.get("device") is not None:
            # There is one device here: what goes to another one leaves the accelerator, or comes back to it.
            host = not host and kwargs.get("dtype") in (None, known[0].dtype)
        for x in made:
            self.hold(x, host)
        if not func.is_view and self._there:
            changes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
            changed = tree_leaves([value for value, change in zip(args, changes, strict=False) if change])
            if func.namespace == "sparse_cl":  # of a parameter as much is touched as it has a gradient of
                tensors = changed = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)]
            self._read |= {_key(x) for x in tensors}
            self._written |= {_key(x) for x in changed if isinstance(x, Tensor)}

    @contextmanager
    def moving(self, moved: list[int]) -> Iterator[None]:
        """Appends the bytes of what is there already and is read meanwhile, once, and of what is written, once more."""
        self._there, self._read, self._written = dict(self._held), set(), set()
        yield
        moved.append(
            sum(self._there[key][1] for part in (self._read, self._written) for key in part & self._there.keys())
        )
        self._there = {}

    def hold(self, tensor: Tensor, host: bool = False) -> None:
        """Counts a tensor's storage until it is gone; with nothing, if it is on the host."""
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._held or (tensor.is_meta and not isinstance(tensor, FakeTensor)):
            return
        size = 0 if host else storage.nbytes()
        wide = size if tensor.dim() > 1 and tensor.shape[-1] == self.wide_at else 0
        self.live, self.wide = self.live + size, self.wide + wide
        self.wide_peak = max(self.wide_peak, self.wide)
        self.peaks[self.phase] = max(self.live, self.peaks.get(self.phase, 0))
        if host:
            self._host.add(key)

        def gone(_: Any) -> None:
            del self._held[key]
            self._host.discard(key)
            self.live, self.wide = self.live - size, self.wide - wide

        self._held[key] = weakref.ref(storage, gone), size


@contextmanager
def dry_run(run: DryRun) -> Iterator[None]:
    """Enters a dry run, in which fake tensors also answer what Python code asks of tensors besides ops."""
    answers: dict[str, Any] = {
        "tolist": lambda self: _filled(self.shape, self),
        "numpy": lambda self: np.full(self.shape, _GUESS, str(self.dtype).rpartition(".")[2]),
        "data_ptr": _key,
    }
    if run.gpu:
        answers["cpu"] = functools.partialmethod(aten._to_copy, device=torch.device("cpu"))
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, answer, create=True))
        # Tensors that the fake mode refers to cannot be swapped, as Module.to does.
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", lambda a, b: setattr(a, "data", b.data)))
        for module in [module for name, module in sys.modules.items() if name.startswith("sparse_cl.")]:
            if hasattr(module, "to_dlpack"):  # by which views of a state get storages of their own; that needs memory
                stack.enter_context(mock.patch.multiple(module, to_dlpack=lambda x: x, from_dlpack=lambda x: x))
            if run.gpu and hasattr(module, "_CPU_ROWS"):  # a GPU takes more rows at a time than a CPU's cache holds
                stack.enter_context(mock.patch.object(module, "_CPU_ROWS", 1 << 14))
        stack.enter_context(run)
        yield


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_real(x: Tensor) -> bool:
    return x.dim() == 0 or (not x.is_floating_point() and x.numel() <= SMALL)


def _filled(shape: Iterable[int], like: Tensor) -> Any:
    """Nested lists of a value that a tensor might have."""
    found: Any = True if like.dtype == torch.bool else _GUESS if like.is_floating_point() else 0
    for size in reversed(tuple(shape)):
        found = [found] * size
    return found


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A Boolean index as integers: all places, where its values are not known."""
    if index is None or index.dtype != torch.bool:
        return [index]
    if isinstance(index, FakeTensor):
        return [torch.empty(index.numel(), dtype=torch.int64) for _ in index.shape]
    with unset_fake_temporarily():
        return list(index.nonzero().unbind(1))
