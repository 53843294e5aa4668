"""Running code without computing: tensors that have a shape but no values, and a ledger of the bytes they would take.

Floating-point tensors are fake (`FakeTensorMode`). Small integer and Boolean tensors (token ids, masks, indices) and
what is computed from them are real, so that code which chooses by them runs as ever. Where code asks a fake tensor for
a value, it gets one that a healthy run could give: true, a small number above 0, all of what is counted, the first k of
what is chosen, a spectrum that falls to zero.
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
from torch.utils import dlpack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from sparse_cl.layout import part
from sparse_cl.subspace import moments

from .split import GATHERS, sent

aten = torch.ops.aten
SMALL = 1 << 20
"""Entries up to which a tensor may be real."""
_GUESS = 1e-5
"""Passes for a count of steps as for a rounding error."""
_FLOPS = {
    **flop_registry,  # which leaves out products in place, and attention as it is fused on a CPU
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
_MOVES_NOTHING = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view)


class DryRun(TorchDispatchMode):
    """The mode of a dry run, to be entered by `dry_run`.

    Args:
        width: of the model's hidden states. A symmetric matrix that is smaller comes from a sketch of a larger one.
        gpu: whether the device is a GPU, so that what is moved to the CPU is not on it.

    Attributes:
        live: bytes of all storages on the device now. peaks: most of these, by phase.
        flops: of products so far, as torch's FlopCounterMode counts them.
        moved: bytes that all other ops read and wrote so far, each op by itself.
        sent: bytes that went to other processes so far. gathered: most of what was whole of split weights at a time.
        share: of the eigenvalues of a symmetric matrix of at least `width` rows, those above zero.
    """

    def __init__(self, width: int, gpu: bool) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.width, self.gpu, self.share = width, gpu, 1.0
        self.live = self.flops = self.moved = self.sent = self.gathered = 0
        self.phase, self.peaks = "", {"": 0}
        self._held: dict[int, weakref.ref] = {}
        self._sizes: dict[int, int] = {}
        self._whole: set[int] = set()
        self._host: set[int] = set()

    def begin(self, phase: str) -> None:
        """From now on peaks are those of this phase."""
        self.phase = phase
        self.peaks[phase] = max(self.live, self.peaks.get(phase, 0))

    def passes(self, phase: str, after: str) -> None:
        """From now on peaks are those of ``after``, if they were those of ``phase``; what there is now is not."""
        self.phase = after if self.phase == phase else self.phase

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of the distinct storages of tensors that are on the device."""
        parts = [part(x) for x in tensors]
        return sum({_key(x): x.untyped_storage().nbytes() for x in parts if _key(x) not in self._host}.values())

    def gathered_now(self) -> int:
        """Bytes that are whole of split weights now, with the buffers in which they came."""
        self.gathered = max(self.gathered, found := sum(self._sizes.get(key, 0) for key in self._whole))
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # of half of all calls, and no op
        if any(hasattr(kind, "from_local") for kind in types):
            return NotImplemented  # a DTensor: the ops on what this process holds of it follow
        kwargs = kwargs or {}
        tensors = _tensors((args, kwargs))
        if any(isinstance(x, FakeTensor) for x in tensors):
            out = self._guess(func, args, kwargs)
        elif tensors and not any(x.is_meta for x in tensors):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            out = tree_map_only(Tensor, lambda x: x if x.numel() <= SMALL else self.fake.from_tensor(x), out)
        else:
            with self.fake:
                out = func(*args, **kwargs)
            made = _tensors(out)
            if not tensors and all(_has_values(x) and x.dtype != torch.uint8 for x in made):  # but buffers of state
                with unset_fake_temporarily():
                    out = func(*args, **kwargs)
        self._account(func, tensors, args, kwargs, out)
        return out

    def _guess(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an op on fake tensors."""
        packet, first = func.overloadpacket, args[0]
        if packet is aten._local_scalar_dense:
            return True if first.dtype == torch.bool else _GUESS if first.is_floating_point() else 0
        if packet is aten.equal:
            return True
        if packet is aten.nonzero and first.numel() <= SMALL:
            with unset_fake_temporarily():
                return torch.ones(first.shape, dtype=torch.bool).nonzero()
        with self.fake:
            if packet is aten.nonzero:
                return torch.empty(first.numel(), first.dim(), dtype=torch.int64)
            if packet in (aten.index, aten.index_put, aten.index_put_):
                args = (first, [part for index in args[1] for part in _places(index)], *args[2:])
            out = func(*args, **kwargs)
        found = _tensors(out)
        with unset_fake_temporarily():
            if packet is aten._linalg_eigh:
                return self._spectrum(out[0]), out[1]
            if not found or not all(_has_values(x) for x in found if not x.is_floating_point()):
                return out
            if packet is aten.sum and not first.is_floating_point():
                return torch.full(out.shape, first.numel() // max(1, out.numel()))
            if packet in (aten.zeros_like, aten.ones_like) and not out.is_floating_point():
                return torch.full(out.shape, int(packet is aten.ones_like), dtype=out.dtype)
            if packet in (aten.topk, aten.sort) and out[1].dim():
                return out[0], torch.arange(out[1].shape[-1]).expand(out[1].shape).contiguous()
            if func.namespace != "aten" and len(found) > 1:  # ranks: full
                return [torch.full(x.shape, found[0].shape[-1]) if x.dtype == torch.int64 else x for x in found]
        return out

    def _spectrum(self, values: Tensor) -> Tensor:
        """Eigenvalues, ascending, of which `share` are above zero.

        Together they are less than any value that is asked for, so that code which adds up the largest of them until
        they explain enough of something takes all of these.
        """
        spectrum = torch.zeros(values.shape, dtype=values.dtype)
        count = min(spectrum.shape[-1], round(self.share * max(self.width, spectrum.shape[-1])))
        spectrum[..., spectrum.shape[-1] - count :] = _GUESS / 100 / max(1, count)
        return spectrum

    def _account(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any, out: Any) -> None:
        """Adds what an op made to the ledger, and what it did to `flops` or `moved`."""
        made = _tensors(out)
        known = [x for x in tensors if isinstance(x, FakeTensor)]
        host = bool(known) and all(_key(x) in self._host for x in known)
        if self.gpu and known and func is aten._to_copy.default and kwargs.get("device") is not None:
            # There is one device here: what goes to another one leaves the accelerator, or comes back to it.
            host = not host and kwargs.get("dtype") in (None, known[0].dtype)
        for x in made:
            self.hold(x, host)
        if func._opname in GATHERS:
            self._whole |= {_key(x) for x in _tensors((args[0], kwargs.get("out")))} & self._held.keys()
            self.gathered_now()
        if func.overloadpacket in _FLOPS:
            self.flops += _FLOPS[func.overloadpacket](*args, **kwargs, out_val=out)
        elif given := sent(func, (*tensors, *made)):
            self.sent += given
            if not self.gpu:
                self._copied(func, (*tensors, *made))
        elif not (func.is_view or func.namespace == "prim" or func.overloadpacket in _MOVES_NOTHING):
            changes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
            changed = [value for value, change in zip(args, changes, strict=False) if change]
            read, written = tensors, _tensors(changed) or made
            if func.namespace == "sparse_cl":  # of a parameter as much is touched as it has a gradient of
                read = written = _tensors(args[1:])
            if func._schema.name == "sparse_cl::apply_updates_":
                # Of a state the master alone: that or the weight goes both ways, and the weight is written beside it.
                read = written = [*args[2], *args[2]]
            elif func._schema.name == "sparse_cl::masked_adamw_" and args[3]:
                read, written = (
                    [*args[1], *args[2]],
                    3 * list(args[3]),
                )  # two moments, and the update in place of a weight
            self.moved += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in (*read, *written))

    def _copied(self, func: Any, tensors: Iterable[Tensor]) -> None:
        """Counts gloo's copy of what is whole, which it receives into or sends from; FSDP2 keeps that of weights."""
        whole = max(tensors, key=lambda x: x.nbytes)
        if func._opname in GATHERS:
            self._resize(_key(whole), 2 * whole.nbytes)
        else:
            self.peaks[self.phase] = max(self.live + whole.nbytes, self.peaks[self.phase])

    def hold(self, tensor: Tensor, host: bool = False) -> None:
        """Counts a tensor's storage until it is gone; with nothing, if it is on the host."""
        storage, key = tensor.untyped_storage(), _key(tensor)
        # By tensors on the meta device DTensors find out the shape of a whole result.
        place = tensor.fake_device.type if isinstance(tensor, FakeTensor) else tensor.device.type
        if key in self._held or place == "meta":
            return
        if host:
            self._host.add(key)

        def gone(_: Any) -> None:
            del self._held[key]
            self._host.discard(key)
            self._whole.discard(key)
            self.live -= self._sizes.pop(key)

        self._held[key] = weakref.ref(storage, gone)
        self._sizes[key] = 0
        self._resize(key, 0 if host else storage.nbytes())

    def resized(self, storage: Any) -> None:
        """Counts a storage by its new size."""
        if storage._cdata in self._held and storage._cdata not in self._host:
            self._resize(storage._cdata, storage.nbytes())

    def _resize(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.peaks[self.phase] = max(self.live, self.peaks[self.phase])


@contextmanager
def dry_run(run: DryRun) -> Iterator[None]:
    """Enters a dry run, in which fake tensors also answer what Python code asks of tensors besides ops."""
    answers: dict[str, Any] = {"numpy": lambda self: np.full(self.shape, _GUESS, str(self.dtype).rpartition(".")[2])}
    if run.gpu:
        answers["cpu"] = functools.partialmethod(aten._to_copy, device=torch.device("cpu"))
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, answer, create=True))
        if run.gpu:  # where blocks of rows are larger, and so fewer
            together = functools.partial(moments.rows_together, on_cpu=False)
            stack.enter_context(mock.patch.object(moments, "rows_together", lambda width, on_cpu: together(width)))
        # Tensors that the fake mode refers to cannot be swapped, as Module.to does.
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", lambda a, b: setattr(a, "data", b.data)))
        # FSDP2 frees and takes again the storages of what it gathers, by no op.
        resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:
            resize(storage, size)
            run.resized(storage)
            return storage

        stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resized))
        # A capsule needs memory. In a dry run a tensor stands for its own.
        for module in [module for module in sys.modules.values() if vars(module).get("to_dlpack") is dlpack.to_dlpack]:
            stack.enter_context(mock.patch.multiple(module, to_dlpack=lambda x: x, from_dlpack=lambda x: x))
        stack.enter_context(run)
        yield


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in nested arguments or results; quicker than pytrees, since every op is asked twice."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [x for value in values for x in _tensors(value)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _has_values(x: Tensor) -> bool:
    return x.dim() == 0 or (not x.is_floating_point() and x.numel() <= SMALL)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """A Boolean index as integers: all places, where its values are not known."""
    if index is None or index.dtype != torch.bool:
        return [index]
    if isinstance(index, FakeTensor):
        return [torch.empty(index.numel(), dtype=torch.int64) for _ in index.shape]
    with unset_fake_temporarily():
        return list(index.nonzero().unbind(1))
