"""What earlier domains use of each layer: observed in one pass, consolidated into a basis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.layout import whole

from . import files
from .consolidation import agree, consolidate
from .layers import Layer, find_layers, follow
from .observer import Observer
from .settings import Settings
from .subspace import Subspace
from .tables import Table, UsedRows


class SubspaceMemory:
    """The input directions U (n, r) that earlier domains use of each weight (m, n), and how much they use each.

    For y = Wx a row of ∂L/∂W lies in the span of the inputs x, so a change with ΔW U = 0 keeps what W computes for
    these inputs, and Σ λ_j ‖ΔW u_j‖² says by how much any other change moves it. In a domain, :meth:`observe` adds up
    what a layer's gradients or inputs span, storing none of them; at its end :meth:`consolidate` takes the leading
    eigenvectors of A = Σ_d w_d E_d[x xᵀ].

    Args:
        model_or_named_params: a model, whose ``nn.Linear`` and Conv1D weights are tracked (one that is tied to an
            embedding too), or (name, parameter) pairs, of which those with two dimensions are. Of inputs, embeddings
            are too: rows stand for directions there, and how often each is looked up for its energy. Of a model
            that PEFT wrapped, what is trained is tracked, and its frozen base is not.
        max_rank: directions that are kept of a layer. None: as many as ``energy`` asks for, and the exact n × n second
            moment is kept; with a cap, that is so up to n = 1024, and wider layers keep a sketch of
            ``max_rank + oversample`` columns. "auto": a quarter of the layer's inputs, 16 to 256.
        energy: share of a domain's Σ‖x‖² to explain, in (0, 1]: the criterion of GPM (Saha, Garg & Roy 2021).
        source: ``"gradients"``: rows of ``.grad``, as they are when :meth:`observe` is called (after unscaling, if a
            GradScaler is used). ``"inputs"``: the inputs of the layers in forward passes with gradients enabled, or in
            those that :meth:`watch` names; needs a model.
        oversample: further columns of the sketch; default an eighth of ``max_rank``, at least 8.
        seed: of the sketch's random signs.
        share_inputs: layers that read one tensor, such as q, k and v, are observed once.

    Observing uses float32 products as ``torch.set_float32_matmul_precision`` has them: TF32 leaves ranks as they are
    up to an energy of 0.99 and makes them a little smaller above. Consolidating is in full precision, its small
    factorizations in float64.

    In a distributed run each process observes its own inputs, and consolidating adds them up. Weights may be split
    along their outputs (FSDP2's ``fully_shard``, ColwiseParallel).

    Memory does not grow with the number of steps: 4 n² or 4 n (max_rank + oversample) bytes per input space while a
    domain is observed, and 4 n r for what is kept.

    Raises:
        ValueError: nothing to track, a weight that is split along its inputs, or an argument out of range.
    """

    def __init__(
        self,
        model_or_named_params: nn.Module | Iterable[tuple[str, Tensor]],
        max_rank: int | str | None = None,
        energy: float = 0.95,
        source: str = "gradients",
        *,
        oversample: int | None = None,
        seed: int = 0,
        share_inputs: bool = True,
    ) -> None:
        settings = Settings(max_rank, energy, source, oversample, seed, share_inputs)
        if source == "inputs" and not isinstance(model_or_named_params, nn.Module):
            raise ValueError('source="inputs" needs the model, whose layers it watches; got named parameters')
        layers, tables = find_layers(model_or_named_params)
        widest = max(layers.values(), key=lambda layer: layer.width)
        if isinstance(max_rank, int) and max_rank > widest.width:
            raise ValueError(
                f"max_rank: expected at most the width of the widest layer, {widest.width} ({widest.name}), "
                f"got {max_rank}; None means no cap"
            )
        self._begin(settings, layers, tables)

    def _begin(self, settings: Settings, layers: dict[str, Layer], tables: dict[str, Table], domains: int = 0) -> None:
        self.settings, self._layers, self._tables = settings, layers, tables
        #: Goes up whenever a basis may have changed, or is tied to other parameters.
        self.version = 0
        self._observer = Observer(settings, layers, tables, domains)
        self._know()

    def _know(self) -> None:
        """Ties names to the parameters of the model that the layers are of."""
        self._by_param = {id(layer.param): layer for layer in self._layers.values() if layer.param is not None}
        self._table_of = {id(table.param): table for table in self._tables.values() if table.param is not None}

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
        inside it count, with gradients or without, and what was noted before is dropped. An error inside it drops all
        that was not yet observed. Compiled layers run as they are written there.

        Args:
            tokens: (batch, length), nonzero where an input counts: the attention mask. Layers whose inputs have other
                leading dimensions count all of theirs.
        """
        return self._observer.watch(tokens)

    @torch.no_grad()
    def consolidate(self, weight: float = 1.0, fade: float = 1.0) -> dict[str, int]:
        """Ends a domain: what it used is remembered, and observing starts anew.

        Args:
            weight: of the domain, above 0.
            fade: what becomes of the weight of all earlier domains, in [0, 1]. Below 1 what is remembered of a domain
                fades with each later one, and the strengths of a pull stay below 1 / (1 - fade) times one domain's.

        Returns:
            For each layer that was observed, how many directions more are remembered.

        Raises:
            ValueError: nothing was observed since the last call; numbers out of range.
        """
        if not 0 < weight < float("inf"):
            raise ValueError(f"weight: expected a number above 0, got {weight}")
        if not 0 <= fade <= 1:
            raise ValueError(f"fade: expected a number in [0, 1], got {fade}")
        if self.settings.source == "inputs":
            agree(self._layers, self._tables, self._observer.moment)
        for layer in self._layers.values():
            if layer.source is not None:
                layer.moment = self._layers[layer.source].moment
        observed = [layer for layer in self._layers.values() if layer.moment is not None]
        if not observed:
            raise ValueError("consolidate: nothing was observed; call observe() in the domain first")
        added = consolidate(observed, list(self._tables.values()), self.settings, weight, fade)
        faded: dict[int, Subspace | None] = {}
        for layer in self._layers.values():
            if layer.name not in added and layer.subspace is not None and fade != 1:
                # Layers that share a subspace go on sharing it.
                layer.subspace = faded.setdefault(id(layer.subspace), layer.faded(fade))
                layer.weight *= fade
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
        if (subspace := self.subspace(key)) is not None:
            return subspace.basis
        device, dtype = self._layer(key).place()
        return torch.zeros(self._layer(key).width, 0, dtype=dtype, device=device)

    def rank(self, key: str | Tensor) -> int:
        """Number of used directions of a weight."""
        return self._layer(key).rank

    def capacity(self, by_use: bool = False) -> dict[str, dict[str, int]]:
        """For each weight its ``width``, and how many of those directions are ``used`` and ``free``.

        Args:
            by_use: direction j counts by u_j / (1 + u_j), u its :attr:`Subspace.usage`, in place of 1.
        """
        used = {name: x.rank_by_use if by_use else x.rank for name, x in self._layers.items()}
        return {n: {"width": x.width, "used": used[n], "free": x.width - used[n]} for n, x in self._layers.items()}

    @torch.no_grad()
    def surviving(self) -> dict[str, float]:
        """For each weight with a gradient, the share of its energy outside the basis: ‖G - G U Uᵀ‖²_F / ‖G‖²_F."""
        grads = {name: None if layer.param is None else layer.param.grad for name, layer in self._layers.items()}
        return {name: 1.0 - self._layers[name].share_inside(g) for name, g in grads.items() if g is not None}

    @torch.no_grad()
    def share_inside(self, name: str, rows: Tensor, by_use: bool = False) -> float:
        """‖R U Uᵀ‖²_F / ‖R‖²_F of any matrix (…, n) of a weight's rows, such as a gradient or a change; 0 of zeros.

        Args:
            by_use: direction j counts by u_j / (1 + u_j), u its :attr:`Subspace.usage`, in place of 1.

        Raises:
            ValueError: a weight that the memory does not track, or rows of another width.
        """
        if (layer := self._layers.get(name)) is None:
            raise ValueError(f"name: expected a weight that the memory tracks, one of its names, got {name!r}")
        if layer.rows(rows).shape[-1] != layer.width:
            raise ValueError(f"rows: expected (…, {layer.width}) for {name!r}, got {tuple(rows.shape)}")
        return layer.share_inside(rows, by_use)

    @torch.no_grad()
    def leak(
        self, before: nn.Module | Mapping[str, Tensor], after: nn.Module | Mapping[str, Tensor]
    ) -> dict[str, float]:
        """For each weight, ‖ΔW U‖²_F / ‖ΔW‖²_F in float64, where ΔW is ``after`` minus ``before``.

        0 where nothing moved, or nothing is used yet.

        Args:
            before, after: modules, or {name: weight}.
        """
        before, after = (
            dict(x.named_parameters(remove_duplicate=False)) if isinstance(x, nn.Module) else x for x in (before, after)
        )
        result = {}
        for name, layer in self._layers.items():
            for given, weights in (("before", before), ("after", after)):
                if name not in weights:
                    raise ValueError(f"{given}: has no weight {name!r}, which the memory tracks")
                if tuple(layer.rows(weights[name]).shape) != layer.shape:
                    raise ValueError(f"{given}: {name!r} is {tuple(weights[name].shape)}, expected {layer.shape}")
            change = whole(after[name].detach()).double() - whole(before[name].detach()).to(after[name].device).double()
            result[name] = layer.share_inside(change)
        return result

    def nbytes(self) -> int:
        """Bytes of the bases, of what was observed, and of the test matrices."""
        moments = [layer.moment for layer in self._layers.values() if layer.moment is not None]
        held = [t for layer in self._layers.values() if (s := layer.subspace) is not None for t in (s.basis, s.values)]
        held += [t for table in self._tables.values() for t in (table.shares, table.counts) if t is not None]
        held += [t for moment in (*moments, *self._observer.pending.values()) for t in moment.tensors().values()]
        return sum(t.nbytes for t in {id(t): t for t in (*held, *self._observer.tests.values())}.values())

    # Files and models.

    def save(self, path: str | PathLike) -> None:
        """Writes bases, settings and what was observed since the last consolidation to a safetensors file."""
        files.save(path, self.settings, self.domains, self._layers, self._tables)

    @classmethod
    def load(
        cls, path: str | PathLike, model_or_named_params: nn.Module | Iterable[tuple[str, Tensor]] | None = None
    ) -> SubspaceMemory:
        """Reads what :meth:`save` wrote, and binds it to a model if one is given.

        Raises:
            ValueError: not a file of ours, or the memory of another model: the first weight that differs is named.
        """
        settings, domains, layers, tables = files.load(path)
        memory = cls.__new__(cls)
        memory._begin(settings, {layer.name: layer for layer, _ in layers}, tables, domains)
        for layer, moment in layers:
            if moment:
                memory._observer.moment(layer).merge(moment)
        if model_or_named_params is not None:
            memory.bind(model_or_named_params)
        return memory

    def bind(self, model_or_named_params: nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Ties the memory to the parameters of a model, by name.

        A head may have grown with the vocabulary since: what goes into it is as before, and new rows come last.

        Raises:
            ValueError: the model lacks a tracked weight or has it in another shape; the memory is as before then.
        """
        found, tables = find_layers(model_or_named_params, frozen=True)
        for name, layer in self._layers.items():
            if name not in found:
                raise ValueError(
                    f"the memory tracks {name!r}, which the model does not have; it was made for another model, whose "
                    f"first weights are {', '.join(self.names[:3])}; this one's are {', '.join(list(found)[:3])}"
                )
            outputs, width = found[name].shape
            grown = outputs > layer.shape[0] and width == layer.width and outputs in {t.height for t in tables.values()}
            if found[name].shape != layer.shape and not grown:
                raise ValueError(
                    f"the memory tracks {name!r} of shape {layer.shape}, but the model has {found[name].shape}; "
                    "it was made for another model"
                )
        for name, table in self._tables.items():
            if name not in tables or tables[name].height < table.height:
                rows = f"{tables[name].height} rows" if name in tables else "none of that name"
                raise ValueError(
                    f"the memory knows the embedding {name!r} of {table.height} rows, but the model has {rows}; "
                    "it was made for another model"
                )
        before = {*self._by_param, *self._table_of}
        moved: dict[tuple, Subspace | None] = {}
        for name, layer in self._layers.items():
            for fact in ("param", "modules", "places", "shape"):
                setattr(layer, fact, getattr(found[name], fact))
            # Layers that share a subspace go on sharing it.
            layer.subspace = moved.setdefault((id(layer.subspace), layer.place()), layer.used())
        for name, table in self._tables.items():
            table.param, table.modules = tables[name].param, tables[name].modules
            table.fit(tables[name].height)
        self._know()
        self._observer.attach()
        self.version += before != {*self._by_param, *self._table_of}

    def follow(self) -> dict[str, Any]:
        """Ties it to the parameters that its layers have now, as after ``fully_shard``; these weights by name."""
        found = follow(self._layers, self._tables)
        self._know()
        return found

    @property
    def is_bound(self) -> bool:
        """Whether it knows the parameters, not only their names."""
        return bool(self._by_param)

    def tracks(self, param: Tensor) -> bool:
        """Whether ``param`` is one of the weights that it is bound to."""
        return id(param) in self._by_param

    @property
    def embeddings(self) -> list[str]:
        """Names of the parameters of embeddings."""
        return list(self._tables)

    def has_seen(self, param: Tensor) -> bool:
        """Whether anything is known of what goes into ``param``; not so where a model uses it outside its layer."""
        return self.tracks(param) and self._layer(param).subspace is not None

    def seen(self) -> dict[str, Tensor]:
        """By name the parameters of its model that it knows something of, embeddings among them."""
        found = {name: table.param for name, table in self._tables.items() if table.shares is not None}
        found |= {name: layer.param for name, layer in self._layers.items() if layer.subspace is not None}
        return {name: param for name, param in found.items() if param is not None}

    def is_embedding(self, key: str | Tensor, counted: bool = False) -> bool:
        """Whether a parameter, or its name, is an embedding's; with ``counted``, of one whose lookups it knows."""
        table = self._tables.get(key) if isinstance(key, str) else self._table_of.get(id(key))
        return table is not None and not (counted and table.shares is None)

    def used_rows(self, key: str | Tensor) -> UsedRows | None:
        """The rows of an embedding that earlier domains look up; None while there are none, or it has none."""
        table = self._tables.get(key) if isinstance(key, str) else self._table_of.get(id(key))
        return None if table is None else table.used()

    def shape(self, name: str) -> tuple[int, int]:
        """(m, n) of a tracked weight."""
        return self._layer(name).shape

    def is_transposed(self, key: str | Tensor) -> bool:
        """Whether a tracked weight is (n, m), as that of transformers' Conv1D."""
        return self._layer(key).transposed

    def __getstate__(self) -> dict[str, Any]:
        # Watching needs modules; a copy or a pickle of a memory should not be one of the whole model.
        own = {"settings": self.settings, "version": self.version, "domains": self.domains}
        layers, tables = ({n: replace(x, modules=[]) for n, x in kept.items()} for kept in (self._layers, self._tables))
        return {**own, "layers": layers, "tables": tables}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._begin(state["settings"], state["layers"], state["tables"], state["domains"])
        self.version = state["version"]

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
