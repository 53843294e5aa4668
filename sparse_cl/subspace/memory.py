"""What earlier domains use of each layer: observed in one pass, consolidated into a basis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import files
from .consolidation import batches, new_directions
from .hooks import InputHook
from .layers import Layer, Moment, find_layers
from .moments import ExactMoment, SketchedMoment, row_blocks
from .subspace import Subspace, energy_of, smaller_half

SOURCES = ("gradients", "inputs")

#: Widths up to this keep the exact second moment: 4 MB, no more than a sketch of a wide layer.
EXACT_WIDTH = 1024


class SubspaceMemory:
    """Orthonormal bases U (n × r) of the input directions that earlier domains use, one for each weight (m, n).

    For y = Wx a row of ∂L/∂W lies in the span of the inputs x, so ΔW U = 0 keeps what W computes for those inputs.
    In a domain, :meth:`observe` adds up what a layer's gradients or inputs span, storing none of them; at its end
    :meth:`consolidate` takes the fewest new directions that, together with the old ones, explain ``energy`` of what
    was observed: the criterion of GPM (Saha, Garg & Roy 2021).

    Args:
        model_or_named_params: a model, whose ``nn.Linear`` weights are tracked (one that is tied to an embedding is
            not), or (name, parameter) pairs, of which those with two dimensions are.
        max_rank: new directions that a domain may add to a layer. None: as many as ``energy`` asks for, and the exact
            n × n second moment is kept; with a cap, that is so up to n = 1024, and wider layers keep a sketch of
            ``max_rank + oversample`` columns.
        energy: share of Σ‖G‖²_F to explain, in (0, 1].
        source: ``"gradients"``: rows of ``.grad``, as they are when :meth:`observe` is called (after unscaling, if a
            GradScaler is used). ``"inputs"``: the inputs of the layers in forward passes with gradients enabled, or in
            those that :meth:`watch` names; needs a model.
        oversample: further columns of the sketch; default an eighth of ``max_rank``, at least 8.
        seed: of the sketch's random signs.

    Observing uses float32 products as ``torch.set_float32_matmul_precision`` has them: TF32 leaves ranks as they are
    up to an energy of 0.99 and makes them a little smaller above. Consolidating is in full precision, its small
    factorizations in float64.

    In a distributed run each process observes its own inputs, and consolidating adds them up. Sharded parameters (FSDP)
    are not supported.

    Memory does not grow with the number of steps: 4 n² or 4 n (max_rank + oversample) bytes a layer while a domain is
    observed, and 4 n r for the basis (4 n (n - r) where r > n/2: the complement is kept).

    Raises:
        ValueError: nothing to track, or an argument out of range.
    """

    def __init__(
        self,
        model_or_named_params: nn.Module | Iterable[tuple[str, Tensor]],
        max_rank: int | None = None,
        energy: float = 0.95,
        source: str = "gradients",
        *,
        oversample: int | None = None,
        seed: int = 0,
    ):
        if source not in SOURCES:
            raise ValueError(f"source: expected one of {', '.join(SOURCES)}, got {source!r}")
        if not 0 < energy <= 1:
            raise ValueError(f"energy: expected a share in (0, 1], got {energy}")
        if max_rank is not None and max_rank < 1:
            raise ValueError(f"max_rank: expected at least 1, or None for no cap, got {max_rank}")
        if oversample is not None and oversample < 0:
            raise ValueError(f"oversample: expected at least 0, got {oversample}")
        if source == "inputs" and not isinstance(model_or_named_params, nn.Module):
            raise ValueError('source="inputs" needs the model, whose layers it watches; got named parameters')
        self._layers, embeddings = find_layers(model_or_named_params)
        widest = max(self._layers.values(), key=lambda layer: layer.width)
        if max_rank is not None and max_rank > widest.width:
            raise ValueError(
                f"max_rank: expected at most the width of the widest layer, {widest.width} ({widest.name}), "
                f"got {max_rank}; None means no cap"
            )
        self.max_rank, self.energy, self.source = max_rank, energy, source
        self.oversample = oversample if max_rank is None or oversample is not None else max(8, max_rank // 8)
        self.seed = seed
        self.domains = 0
        #: Goes up whenever a basis may have changed.
        self.version = 0
        self._take_embeddings(embeddings)
        self._by_param = {id(layer.param): layer for layer in self._layers.values()}
        self._pending: dict[str, Moment] = {}
        self._tests: dict[tuple, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._set_hooks()

    # What a training loop calls.

    @torch.no_grad()
    def observe(self) -> None:
        """Adds what is there to observe: each tracked weight's ``.grad``, or the inputs noted since the last call.

        Waits for the device once, to look for values that are not finite. Call it after ``backward``, or as
        ``optimizer.register_step_pre_hook(lambda *_: memory.observe())``.

        Raises:
            ValueError: a layer's gradient or input holds NaN or infinity; nothing is added then, and the memory goes
                on. Or there is nothing to observe.
        """
        if self.source == "inputs":
            pending, self._pending = self._pending, {}
            if not pending:
                raise ValueError(
                    "observe: no forward pass was noted since the last call; run the model with gradients enabled, or "
                    "inside `with memory.watch():`"
                )
            self._refuse_not_finite(list(pending), [moment.energy() for moment in pending.values()])
            for name, moment in pending.items():
                layer = self._layers[name]
                if layer.moment is None:
                    layer.moment = moment
                else:
                    self._moment(layer).merge(moment.tensors())
            return
        seen = [layer for layer in self._layers.values() if layer.param is not None and layer.param.grad is not None]
        if not seen:
            raise ValueError("observe: no tracked weight has a gradient; call it after backward, before zero_grad")
        norms = [torch.linalg.vector_norm(layer.param.grad, dtype=layer.place()[1]) for layer in seen]
        self._refuse_not_finite([layer.name for layer in seen], norms)
        for layer in seen:
            with torch.autocast(layer.param.device.type, enabled=False):
                self._moment(layer).add(layer.param.grad, self._follow(layer))

    @contextmanager
    def watch(self, tokens: Tensor | None = None) -> Iterator[None]:
        """While it lasts, forward passes are noted for the next :meth:`observe` (``source="inputs"``).

        Without it those with gradients enabled are, as a training loop has them. From the first use on only passes
        inside it count, with gradients or without, and what was noted before is dropped.

        Args:
            tokens: (batch, length), nonzero where an input counts: the attention mask. Layers whose inputs have other
                leading dimensions count all of theirs.
        """
        if self.source != "inputs":
            raise ValueError(f'watch: the memory\'s source is "{self.source}"; build it with source="inputs"')
        if not self._handles:
            raise ValueError("watch: the memory is bound to no model; call memory.bind(model) first")
        if self._noting == "training":
            self._pending = {}
        self._noting, self._tokens = "all", tokens
        try:
            yield
        finally:
            self._noting, self._tokens = "nothing", None

    def note(self, name: str, inputs: Tensor) -> None:
        """Notes the inputs (..., n) of a layer, if passes count now; for the layers' hooks."""
        if self._noting == "all" or (self._noting == "training" and torch.is_grad_enabled()):
            # Under a caller's autocast products would be in bfloat16, and not fit the sums.
            with torch.autocast(inputs.device.type, enabled=False):
                self._note(self._layers[name], inputs.detach())

    @torch.no_grad()
    def consolidate(self) -> dict[str, int]:
        """Ends a domain: what it used joins the bases, and observing starts anew.

        Returns:
            For each layer that was observed, the number of directions that were added.

        Raises:
            ValueError: nothing was observed since the last call.
        """
        observed = [layer for layer in self._layers.values() if layer.moment is not None]
        if not observed:
            raise ValueError("consolidate: nothing was observed; call observe() in the domain first")
        if self.source == "inputs":
            # Gradients are the same in every process of a distributed run; inputs are not, and bases must be.
            _sum_over_processes(tensor for layer in observed for tensor in layer.moment.tensors().values())
        grown: dict[str, Subspace] = {}
        added = {}
        for layers in batches(observed):
            subspaces = [self._follow(layer) for layer in layers]
            found = new_directions([layer.moment for layer in layers], subspaces, self.energy, self.max_rank)
            for layer, subspace, directions in zip(layers, subspaces, found, strict=True):
                added[layer.name] = directions.shape[1]
                grown[layer.name] = smaller_half(directions) if subspace is None else subspace.extended(directions)
        # Only now, so that a factorization that fails leaves the domain open.
        for layer in observed:
            layer.subspace, layer.moment = grown[layer.name], None
        self._pending, self._tests = {}, {}
        self.domains += 1
        self.version += 1
        return {layer.name: added[layer.name] for layer in observed}

    # What it knows.

    @property
    def names(self) -> list[str]:
        """Names of the tracked weights."""
        return list(self._layers)

    def subspace(self, key: str | Tensor) -> Subspace | None:
        """The used subspace of a weight, by its name or itself; None while there is none.

        Raises:
            KeyError: the memory does not track it.
        """
        return self._follow(self._layer(key))

    def basis(self, key: str | Tensor) -> Tensor:
        """(n, rank): an orthonormal basis of the used directions of a weight."""
        layer, subspace = self._layer(key), self.subspace(key)
        if subspace is None:
            device, dtype = layer.place()
            return torch.zeros(layer.width, 0, dtype=dtype, device=device)
        return subspace.basis()

    def rank(self, key: str | Tensor) -> int:
        """Number of used directions of a weight."""
        return self._layer(key).rank

    def capacity(self) -> dict[str, dict[str, int]]:
        """For each weight its ``width``, and how many of those directions are ``used`` and ``free``."""
        return {
            name: {"width": layer.width, "used": layer.rank, "free": layer.width - layer.rank}
            for name, layer in self._layers.items()
        }

    @torch.no_grad()
    def surviving(self) -> dict[str, float]:
        """For each weight with a gradient, the share of its energy outside the basis: ‖G - G U Uᵀ‖²_F / ‖G‖²_F."""
        result = {}
        for name, layer in self._layers.items():
            if layer.param is not None and layer.param.grad is not None:
                result[name] = 1.0 - self._share_inside(layer, layer.param.grad)
        return result

    @torch.no_grad()
    def share_inside(self, name: str, rows: Tensor) -> float:
        """‖R U Uᵀ‖²_F / ‖R‖²_F of any matrix (…, width) of a weight's rows, such as a gradient or a change; 0 of zeros.

        Raises:
            ValueError: a weight that the memory does not track, or rows of another width.
        """
        if name not in self._layers:
            raise ValueError(f"name: expected a weight that the memory tracks, one of its names, got {name!r}")
        layer = self._layers[name]
        if rows.shape[-1] != layer.width:
            raise ValueError(f"rows: expected (…, {layer.width}) for {name!r}, got {tuple(rows.shape)}")
        return self._share_inside(layer, rows)

    @torch.no_grad()
    def leak(
        self, before: nn.Module | Mapping[str, Tensor], after: nn.Module | Mapping[str, Tensor]
    ) -> dict[str, float]:
        """For each weight, ‖ΔW U‖²_F / ‖ΔW‖²_F in float64, where ΔW is ``after`` minus ``before``.

        0 where nothing moved, or nothing is used yet.

        Args:
            before, after: modules, or {name: weight}.
        """
        before, after = _weights(before), _weights(after)
        result = {}
        for name, layer in self._layers.items():
            for given, weights in (("before", before), ("after", after)):
                if name not in weights:
                    raise ValueError(f"{given}: has no weight {name!r}, which the memory tracks")
                if tuple(weights[name].shape) != layer.shape:
                    raise ValueError(
                        f"{given}: {name!r} has shape {tuple(weights[name].shape)}, expected {layer.shape}"
                    )
            change = after[name].detach().double() - before[name].detach().to(after[name].device).double()
            result[name] = self._share_inside(layer, change)
        return result

    def nbytes(self) -> int:
        """Bytes of the bases, of what was observed, and of the test matrices."""
        held = [layer.subspace.matrix for layer in self._layers.values() if layer.subspace is not None]
        moments = [layer.moment for layer in self._layers.values() if layer.moment is not None]
        held += [t for moment in (*moments, *self._pending.values()) for t in moment.tensors().values()]
        return sum(tensor.nbytes for tensor in (*held, *self._tests.values()))

    # Files and models.

    def save(self, path: str | PathLike) -> None:
        """Writes bases, settings and what was observed since the last consolidation to a safetensors file."""
        files.save(vars(self), self._layers, path)

    @classmethod
    def load(
        cls, path: str | PathLike, model_or_named_params: nn.Module | Iterable[tuple[str, Tensor]] | None = None
    ) -> SubspaceMemory:
        """Reads what :meth:`save` wrote, and binds it to a model if one is given.

        Raises:
            ValueError: no such file of ours, or the memory of another model: the first weight that differs is named.
        """
        settings, layers = files.load(path)
        memory = cls.__new__(cls)
        vars(memory).update(settings)
        memory.version, memory._embeddings = 0, {}
        memory._layers, memory._by_param, memory._pending, memory._tests, memory._handles = {}, {}, {}, {}, []
        memory._set_hooks()
        for layer, moment in layers:
            memory._layers[layer.name] = layer
            if moment:
                memory._moment(layer).merge(moment)
        if model_or_named_params is not None:
            memory.bind(model_or_named_params)
        return memory

    def bind(self, model_or_named_params: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Ties the memory to the parameters of a model, by name.

        Raises:
            ValueError: the model lacks a tracked weight or has it in another shape; the memory is as before then.
        """
        found, embeddings = find_layers(model_or_named_params)
        for name, layer in self._layers.items():
            if name not in found:
                raise ValueError(
                    f"the memory tracks {name!r}, which the model has not; it was made for another model, whose first "
                    f"weights are {', '.join(self.names[:3])}; this one's are {', '.join(list(found)[:3])}"
                )
            if found[name].shape != layer.shape:
                raise ValueError(
                    f"the memory tracks {name!r} of shape {layer.shape}, but the model has {found[name].shape}; "
                    "it was made for another model"
                )
        for name, layer in self._layers.items():
            layer.param, layer.modules = found[name].param, found[name].modules
        self._by_param = {id(layer.param): layer for layer in self._layers.values()}
        self._take_embeddings(embeddings)
        self._set_hooks()
        self.version += 1

    @property
    def is_bound(self) -> bool:
        """Whether it knows the parameters, not only their names."""
        return bool(self._by_param)

    def tracks(self, param: Tensor) -> bool:
        """Whether ``param`` is one of the weights that it is bound to."""
        return id(param) in self._by_param

    def is_embedding(self, param: Tensor) -> bool:
        """Whether ``param`` belongs to an embedding of the model that it is bound to."""
        return id(param) in self._embeddings

    def shape(self, name: str) -> tuple[int, int]:
        """(m, n) of a tracked weight."""
        return self._layer(name).shape

    def __getstate__(self) -> dict[str, Any]:
        # Watching needs modules; a copy or a pickle of a memory should not be one of the whole model.
        layers = {name: Layer(**{**vars(layer), "modules": []}) for name, layer in self._layers.items()}
        state = {**vars(self), "_layers": layers, "_by_param": None, "_embeddings": list(self._embeddings.values())}
        return {**state, "_pending": {}, "_tests": {}, "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._by_param = {id(layer.param): layer for layer in self._layers.values() if layer.param is not None}
        self._embeddings = {id(param): param for param in state["_embeddings"]}

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", ()):
            handle.remove()

    def __repr__(self) -> str:
        used, width = (sum(c[k] for c in self.capacity().values()) for k in ("used", "width"))
        share = f"{used / width:.0%} of the directions used" if width else "no width"
        return f"SubspaceMemory({len(self._layers)} weights, {self.domains} domains, {share})"

    # Inside.

    @torch.no_grad()
    def _note(self, layer: Layer, inputs: Tensor) -> None:
        if inputs.shape[-1] != layer.width:
            return  # the layer itself says best what is wrong
        rows = inputs.reshape(-1, layer.width)
        if self._tokens is not None:
            keep = self._tokens.reshape(-1).ne(0)
            if inputs.shape[:-1] in (self._tokens.shape, keep.shape):
                rows = rows[keep.to(rows.device)]
        if layer.name not in self._pending:
            self._pending[layer.name] = self._new_moment(layer)
        self._pending[layer.name].add(rows, self._follow(layer))

    def _set_hooks(self) -> None:
        """Hooks on the layers of the model that the memory is bound to now, if it looks at inputs."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._pending = [], {}
        #: Which forward passes are noted: those in "training" (gradients enabled), "all", or "nothing".
        self._noting, self._tokens = "training", None
        if self.source == "inputs":
            self._handles = [
                module.register_forward_pre_hook(InputHook(self, layer.name), with_kwargs=True)
                for layer in self._layers.values()
                for module in layer.modules
            ]

    def _take_embeddings(self, embeddings: Mapping[str, Tensor]) -> None:
        #: Names of the parameters of embeddings, which are not tracked.
        self.embeddings = list(embeddings)
        # Held with the parameters, so that no other tensor can take their identity.
        self._embeddings = {id(param): param for param in embeddings.values()}

    def _layer(self, key: str | Tensor) -> Layer:
        layer = self._layers.get(key) if isinstance(key, str) else self._by_param.get(id(key))
        if layer is None:
            what = repr(key) if isinstance(key, str) else f"a parameter of shape {tuple(key.shape)}"
            raise KeyError(f"the memory does not track {what}; the first it tracks are {', '.join(self.names[:3])}")
        return layer

    def _follow(self, layer: Layer) -> Subspace | None:
        """The subspace of a layer, moved to where its parameter is now."""
        if layer.subspace is not None and layer.param is not None:
            layer.subspace = layer.subspace.to(*layer.place())
        return layer.subspace

    def _moment(self, layer: Layer) -> Moment:
        """What was observed of a layer, where its parameter is now; empty if nothing was."""
        old = layer.moment
        if old is None or old.place != layer.place():
            layer.moment = self._new_moment(layer)
            if old is not None:
                layer.moment.merge({key: tensor.to(layer.moment.place[0]) for key, tensor in old.tensors().items()})
        return layer.moment

    def _new_moment(self, layer: Layer) -> Moment:
        device, dtype = layer.place()
        width = layer.width
        if self.max_rank is None or width <= EXACT_WIDTH or self.max_rank + self.oversample >= width:
            return ExactMoment(width, dtype, device)
        key = (width, device, dtype)
        if key not in self._tests:
            # Signs are exact in every dtype, and drawn on the CPU they are the same on every device.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.domains)
            signs = torch.randint(0, 2, (width, self.max_rank + self.oversample), generator=generator)
            self._tests[key] = (2 * signs - 1).to(device=device, dtype=dtype)
        return SketchedMoment(self._tests[key])

    def _refuse_not_finite(self, names: list[str], norms: list[Tensor]) -> None:
        finite = torch.stack([norm.double().to(norms[0].device) for norm in norms]).isfinite().tolist()
        if not all(finite):
            what = "gradient" if self.source == "gradients" else "input"
            raise ValueError(
                f"observe: the {what} of {names[finite.index(False)]!r} holds NaN or infinity, so nothing was "
                "observed; skip this step and go on"
            )

    def _share_inside(self, layer: Layer, rows: Tensor) -> float:
        subspace = self._follow(layer)
        if subspace is None or subspace.rank == 0:
            return 0.0
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        subspace = subspace.to(rows.device, wide)
        total = inside = 0.0
        for block in row_blocks(rows, wide):
            total += float(energy_of(block))
            inside += float(subspace.used_energy(block))
        return min(1.0, inside / total) if total else 0.0


def _sum_over_processes(tensors: Iterable[Tensor]) -> None:
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def _weights(source: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(source.named_parameters(remove_duplicate=False)) if isinstance(source, nn.Module) else source
