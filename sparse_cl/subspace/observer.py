"""Observing a domain: the gradients or inputs of each layer, added up until the domain is consolidated."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_cl.layout import whole

from .layers import Layer
from .moments import ExactMoment, Moment, SketchedMoment
from .settings import Settings
from .tables import Table


class Observer:
    """Adds up what the layers of one memory see.

    Args:
        settings: of the memory.
        layers, tables: of the memory, by name; what was observed is put there.
        domains: how many domains have ended. Each has random signs of its own.
    """

    def __init__(
        self, settings: Settings, layers: Mapping[str, Layer], tables: Mapping[str, Table], domains: int = 0
    ) -> None:
        self.settings, self.layers, self.tables, self.domains = settings, layers, tables, domains
        #: Inputs that forward passes brought since the last call of :meth:`observe`.
        self.pending: dict[str, Moment] = {}
        #: And how often they looked up each row of a table.
        self.lookups: dict[str, Tensor] = {}
        #: How many each layer read.
        self.reads: Counter[str] = Counter()
        #: Test matrices of sketches.
        self.tests: dict[tuple, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._tokens: Tensor | None = None
        #: By device the places of the tokens that count.
        self._counted: dict[torch.device, Tensor] = {}
        #: The inputs that were noted last, what tells whether they still hold the same, and the layer that read them.
        self._last: tuple[Tensor, int | Tensor, str] | None = None
        self.attach()

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", ()):
            handle.remove()

    def attach(self) -> None:
        """Puts hooks on the modules that the layers have now, if inputs are observed."""
        for handle in self._handles:
            handle.remove()
        self._drop()
        #: Which forward passes are noted: those in "training" (gradients enabled), "all", or "nothing".
        self._noting, self._tokens = "training", None
        self._handles = []
        if self.settings.source != "inputs":
            return
        for name, layer in self.layers.items():
            self._handles += [m.register_forward_pre_hook(_Hook(self, name), with_kwargs=True) for m in layer.modules]
        for name, table in self.tables.items():
            self._handles += [m.register_forward_hook(_Hook(self, name), with_kwargs=True) for m in table.modules]

    @contextmanager
    def watch(self, tokens: Tensor | None) -> Iterator[None]:
        """See :meth:`SubspaceMemory.watch`."""
        if self.settings.source != "inputs":
            raise ValueError(f'watch: the memory\'s source is "{self.settings.source}"; build it with source="inputs"')
        if not self._handles:
            raise ValueError("watch: the memory is bound to no model; call memory.bind(model) first")
        before = self._noting, self._tokens, self._counted
        if self._noting == "training":
            self._drop()
            before = "nothing", None, {}
        self._noting, self._tokens, self._counted = "all", tokens, {}
        try:
            with _uncompiled():
                yield
        except BaseException:
            self._drop()  # a pass that broke off was noted by the layers that it reached
            raise
        finally:
            self._noting, self._tokens, self._counted = before
            self._last = None

    def note(self, name: str, inputs: Tensor) -> None:
        """Notes the inputs (..., n) of a layer, if passes count now."""
        if self._notes():
            with _ordinary():
                self._note(self.layers[name], inputs)

    def _notes(self) -> bool:
        return self._noting == "all" or (self._noting == "training" and torch.is_grad_enabled())

    def note_lookup(self, name: str, ids: Any, rows: Any, weight: Tensor) -> None:
        """Notes what a table's module was given and what it returned, if passes count now."""
        if self._notes() and (found := self.tables[name].looked_up(ids, rows, weight)) is not None:
            with _ordinary():
                counts = torch.bincount(self._counting(found, found.shape), minlength=self.tables[name].height).double()
                self.lookups[name] = self.lookups[name] + counts if name in self.lookups else counts

    def _counting(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Of rows (or ids) with these leading dimensions those that `watch` counts, flat."""
        flat = rows.reshape(-1, *rows.shape[len(shape) :])
        if self._tokens is None:
            return flat
        if tuple(shape) not in (self._tokens.shape, (self._tokens.numel(),)):
            return flat
        if flat.device not in self._counted:
            # Once for all layers: a GPU is waited for.
            self._counted[flat.device] = self._tokens.to(flat.device).reshape(-1).nonzero().view(-1)
        return flat.index_select(0, self._counted[flat.device])

    def _note(self, layer: Layer, inputs: Tensor) -> None:
        if inputs.shape[-1] != layer.width:
            return  # the layer itself says best what is wrong
        if not inputs.numel():
            return  # an expert that no token was sent to has seen nothing
        self.reads[layer.name] += 1
        if self._shared(layer, inputs):
            return
        rows = self._counting(inputs, inputs.shape[:-1])
        if layer.name not in self.pending:
            self.pending[layer.name] = self._new_moment(layer)
        self._add(self.pending[layer.name], rows)

    def _shared(self, layer: Layer, inputs: Tensor) -> bool:
        """Whether another layer noted these inputs just now: q, k, v read one tensor, and one moment does for all."""
        if not self.settings.share_inputs:
            return False
        first = None
        if self._last is not None and self._last[0] is inputs and _still(inputs, self._last[1]):
            first = self._last[2]
        if layer.source is None and first is not None and self._may_share(layer, self.layers[first]):
            layer.source = first
        if layer.source not in (None, first) and self.reads[layer.name] > self.reads[str(layer.source)]:
            self._part(layer, self.layers[str(layer.source)])
        if layer.source not in (None, first):
            raise ValueError(
                f"watch: {layer.name} read the inputs of {layer.source} until now, and others this time; build the "
                "memory with share_inputs=False"
            )
        if layer.source is None:
            # Inference mode counts no versions.
            self._last = inputs, inputs.clone() if inputs.is_inference() else inputs._version, layer.name
        return layer.source is not None

    def _may_share(self, layer: Layer, first: Layer) -> bool:
        """Whether nothing was noted of either before this read, and each is read where the other is."""
        if layer.places > 1 or first.places > 1:
            return False
        fresh = layer.moment is None and first.moment is None and self.reads[layer.name] == self.reads[first.name] == 1
        return fresh and layer is not first and layer.place() == first.place()

    def _part(self, layer: Layer, source: Layer) -> None:
        """Gives a layer that reads once more than its source a moment of its own; so far they read the same."""
        layer.source = None
        if source.moment is not None:
            layer.moment = self._new_moment(layer)
            layer.moment.merge(source.moment.tensors())
        if source.name in self.pending:
            self.pending[layer.name] = self._new_moment(layer)
            self.pending[layer.name].merge(self.pending[source.name].tensors())

    def _drop(self) -> None:
        self.pending, self.lookups, self.reads, self._last = {}, {}, Counter(), None

    @torch.no_grad()
    def observe(self) -> None:
        """See :meth:`SubspaceMemory.observe`."""
        if self.settings.source == "inputs":
            pending, lookups, reads = self.pending, self.lookups, self.reads
            self._drop()
            if not pending:
                raise ValueError(
                    "observe: no forward pass was noted since the last call; run the model with gradients enabled, or "
                    "inside `with memory.watch():`"
                )
            self._refuse_parted(reads)
            self._refuse_not_finite("input", {name: moment.energy() for name, moment in pending.items()})
            for name, moment in pending.items():
                layer = self.layers[name]
                if layer.moment is None:
                    layer.moment = moment
                else:
                    self.moment(layer).merge(moment.tensors())
            for name, counts in lookups.items():
                self.tables[name].count(counts)
            return
        gradients = {
            name: whole(layer.param.grad)
            for name, layer in self.layers.items()
            if layer.param is not None and layer.param.grad is not None
        }
        if not gradients:
            raise ValueError("observe: no tracked weight has a gradient; call it after backward, before zero_grad")
        norms = {
            name: torch.linalg.vector_norm(gradient, dtype=self.layers[name].place()[1])
            for name, gradient in gradients.items()
        }
        self._refuse_not_finite("gradient", norms)
        for name, gradient in gradients.items():
            self._add(self.moment(self.layers[name]), self.layers[name].rows(gradient))

    def end_domain(self) -> None:
        self._drop()
        self.tests = {}
        for layer in self.layers.values():
            layer.source = None
        self.domains += 1

    def moment(self, layer: Layer) -> Moment:
        """What was observed of a layer, where its parameter is now; empty if nothing was."""
        old = layer.moment
        if old is not None and old.place == layer.place():
            return old
        layer.moment = new = self._new_moment(layer)
        if old is not None:
            new.merge({key: tensor.to(new.place[0]) for key, tensor in old.tensors().items()})
        return new

    @staticmethod
    def _add(moment: Moment, rows: Tensor) -> None:
        # Under a caller's autocast products would be in bfloat16, and not fit the sums.
        with torch.autocast(rows.device.type, enabled=False):
            moment.add(rows)

    def _new_moment(self, layer: Layer) -> Moment:
        device, dtype = layer.place()
        columns = self.settings.sketch_columns(layer.width)
        if columns is None:
            return ExactMoment(layer.width, dtype, device)
        key = (layer.width, device, dtype)
        if key not in self.tests:
            # Signs are exact in every dtype, and drawn on the CPU they are the same on every device.
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.domains)
            signs = torch.randint(0, 2, (layer.width, columns), generator=generator, device="cpu")
            self.tests[key] = (2 * signs - 1).to(device=device, dtype=dtype)
        return SketchedMoment(self.tests[key])

    def _refuse_parted(self, reads: Counter[str]) -> None:
        for layer in self.layers.values():
            if layer.source is not None and reads[layer.name] != reads[layer.source]:
                raise ValueError(
                    f"observe: {layer.source} read {reads[layer.source]} inputs since the last call and {layer.name} "
                    f"{reads[layer.name]}, so that one moment does not do for both and nothing was observed; build the "
                    "memory with share_inputs=False"
                )

    def _refuse_not_finite(self, what: str, norms: Mapping[str, Tensor]) -> None:
        first = next(iter(norms.values())).device
        finite = torch.stack([norm.double().to(first) for norm in norms.values()]).isfinite().tolist()
        if not all(finite):
            raise ValueError(
                f"observe: the {what} of {list(norms)[finite.index(False)]!r} holds NaN or infinity, so nothing was "
                "observed; skip this step and go on"
            )


def _uncompiled() -> Any:
    """Passes run as they are written: what was compiled before the hooks came would run without them."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _ordinary() -> Iterator[None]:
    """What is made here can be added to later, whatever mode a pass runs in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _still(inputs: Tensor, held: int | Tensor) -> bool:
    return torch.equal(inputs, held) if isinstance(held, Tensor) else inputs._version == held


class _Hook:
    """Tells an observer of each input of a layer, or of the ids that a table is given, beside what it returns.

    It does not keep the observer alive, and a copy or a pickle of it tells nobody: a copied model is another model.
    """

    def __init__(self, observer: Observer, name: str) -> None:
        self._observer: weakref.ref[Observer] | None = weakref.ref(observer)
        self._name = name

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], *rows: Any) -> None:
        observer = None if self._observer is None else self._observer()
        given = inputs or tuple(named.values())
        if observer is None or not given:
            return
        if rows:
            weight: Any = module.weight
            observer.note_lookup(self._name, given[0], rows[0], weight)
        else:
            observer.note(self._name, given[0])

    def __getstate__(self) -> dict[str, Any]:
        return {"_observer": None, "_name": self._name}
