"""What earlier domains use of each layer: observed in one pass, consolidated into a basis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from . import files
from .consolidation import consolidate
from .layers import Layer, find_layers
from .observer import Observer
from .settings import Settings
from .subspace import Subspace


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

    Memory does not grow with the number of steps: 4 n² or 4 n (max_rank + oversample) bytes per layer while a domain is
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
    ) -> None:
        settings = Settings(max_rank, energy, source, oversample, seed)
        if source == "inputs" and not isinstance(model_or_named_params, nn.Module):
            raise ValueError('source="inputs" needs the model, whose layers it watches; got named parameters')
        layers, embeddings = find_layers(model_or_named_params)
        widest = max(layers.values(), key=lambda layer: layer.width)
        if max_rank is not None and max_rank > widest.width:
            raise ValueError(
                f"max_rank: expected at most the width of the widest layer, {widest.width} ({widest.name}), "
                f"got {max_rank}; None means no cap"
            )
        self._begin(settings, layers)
        self._know(embeddings)

    def _begin(self, settings: Settings, layers: dict[str, Layer], domains: int = 0) -> None:
        self.settings = settings
        #: Goes up whenever a basis may have changed.
        self.version = 0
        self._layers, self._observer = layers, Observer(settings, layers, domains)

    def _know(self, embeddings: Mapping[str, Tensor]) -> None:
        """Ties names to the parameters of the model that the layers are of."""
        self._by_param = {id(layer.param): layer for layer in self._layers.values() if layer.param is not None}
        #: Names of the parameters of embeddings, which are not tracked.
        self.embeddings = list(embeddings)
        # Held with the parameters, so that no other tensor can take their identity.
        self._embeddings = {id(param): param for param in embeddings.values()}

    # What a training loop calls.

    def observe(self) -> None:
        """Adds what is there to observe: each tracked weight's ``.grad``, or the inputs noted since the last call.

        Waits for the device once, to look for values that are not finite. Call it after ``backward``, or as
        ``optimizer.register_step_pre_hook(lambda *_: memory.observe())``.

        Raises:
            ValueError: a layer's gradient or input holds NaN or infinity; nothing is added then, and the memory goes
                on. Or there is nothing to observe.
        """
        self._observer.observe()

    def watch(self, tokens: Tensor | None = None) -> AbstractContextManager[None]:
        """While it lasts, forward passes are noted for the next :meth:`observe` (``source="inputs"``).

        Without it those with gradients enabled are, as a training loop has them. From the first use on only passes
        inside it count, with gradients or without, and what was noted before is dropped.

        Args:
            tokens: (batch, length), nonzero where an input counts: the attention mask. Layers whose inputs have other
                leading dimensions count all of theirs.
        """
        return self._observer.watch(tokens)

    def note(self, name: str, inputs: Tensor) -> None:
        """Notes the inputs (..., n) of a layer, as its hook does, if passes count now."""
        self._observer.note(name, inputs)

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
        settings = self.settings
        added = consolidate(observed, settings.energy, settings.max_rank, sum_up=settings.source == "inputs")
        self._observer.end_domain()
        self.version += 1
        return added

    # What it knows.

    @property
    def domains(self) -> int:
        """How many domains have ended."""
        return self._observer.domains

    @property
    def names(self) -> list[str]:
        """Names of the tracked weights."""
        return list(self._layers)

    def subspace(self, key: str | Tensor) -> Subspace | None:
        """The used subspace of a weight, by its name or itself; None while there is none.

        Raises:
            KeyError: the memory does not track it.
        """
        return self._layer(key).used()

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
                result[name] = 1.0 - layer.share_inside(layer.param.grad)
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
        return layer.share_inside(rows)

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
            result[name] = layer.share_inside(change)
        return result

    def nbytes(self) -> int:
        """Bytes of the bases, of what was observed, and of the test matrices."""
        held = [layer.subspace.matrix for layer in self._layers.values() if layer.subspace is not None]
        moments = [layer.moment for layer in self._layers.values() if layer.moment is not None]
        held += [t for moment in (*moments, *self._observer.pending.values()) for t in moment.tensors().values()]
        return sum(tensor.nbytes for tensor in (*held, *self._observer.tests.values()))

    # Files and models.

    def save(self, path: str | PathLike) -> None:
        """Writes bases, settings and what was observed since the last consolidation to a safetensors file."""
        files.save(path, self.settings, self.domains, self.embeddings, self._layers)

    @classmethod
    def load(
        cls, path: str | PathLike, model_or_named_params: nn.Module | Iterable[tuple[str, Tensor]] | None = None
    ) -> SubspaceMemory:
        """Reads what :meth:`save` wrote, and binds it to a model if one is given.

        Raises:
            ValueError: not a file of ours, or the memory of another model: the first weight that differs is named.
        """
        settings, domains, embeddings, layers = files.load(path)
        memory = cls.__new__(cls)
        memory._begin(settings, {layer.name: layer for layer, _ in layers}, domains)
        memory._know({})
        memory.embeddings = embeddings
        for layer, moment in layers:
            if moment:
                memory._observer.moment(layer).merge(moment)
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
                    f"the memory tracks {name!r}, which the model does not have; it was made for another model, whose "
                    f"first weights are {', '.join(self.names[:3])}; this one's are {', '.join(list(found)[:3])}"
                )
            if found[name].shape != layer.shape:
                raise ValueError(
                    f"the memory tracks {name!r} of shape {layer.shape}, but the model has {found[name].shape}; "
                    "it was made for another model"
                )
        for name, layer in self._layers.items():
            layer.param, layer.modules = found[name].param, found[name].modules
        self._know(embeddings)
        self._observer.attach()
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
        own = {"settings": self.settings, "version": self.version, "embeddings": self.embeddings}
        return {**own, "domains": self.domains, "layers": layers, "tied": list(self._embeddings.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(state["settings"], state["layers"], state["domains"])
        self._know({})
        self.version, self.embeddings = state["version"], state["embeddings"]
        self._embeddings = {id(param): param for param in state["tied"]}

    def __repr__(self) -> str:
        used, width = (sum(c[k] for c in self.capacity().values()) for k in ("used", "width"))
        share = f"{used / width:.0%} of the directions used" if width else "no width"
        return f"SubspaceMemory({len(self._layers)} weights, {self.domains} domains, {share})"

    def _layer(self, key: str | Tensor) -> Layer:
        layer = self._layers.get(key) if isinstance(key, str) else self._by_param.get(id(key))
        if layer is None:
            what = repr(key) if isinstance(key, str) else f"a parameter of shape {tuple(key.shape)}"
            raise KeyError(f"the memory does not track {what}; the first it tracks are {', '.join(self.names[:3])}")
        return layer


def _weights(source: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return dict(source.named_parameters(remove_duplicate=False)) if isinstance(source, nn.Module) else source
