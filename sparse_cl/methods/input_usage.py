"""What earlier domains put into the layers of a model, and how much of each direction they use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_cl.models.parts import Linear, find_blocks, shape_of
from sparse_cl.models.passes import answer_tokens, stream
from sparse_cl.probes.inputs import InputProbe, energy_watches

from .base import Batch
from .surviving import surviving_shares

_TOKENS = "tokens"


class InputUsage:
    """Second moments of layers' inputs, and the shares of tokens, summed over texts; each text counts alike.

    The directions q_j are the eigenvectors of A = Σ E[x xᵀ]. The usage of q_j is u_j = λ_j / μ, with μ the mean λ of
    one text; the fraction u_j / (1 + u_j) counts as taken, so the account of capacity needs no threshold. For inputs
    with more than `max_width` features only the diagonal of A is kept, and the features themselves are the directions.

    Args:
        base: the model without adapters; its layers are known by themselves, whatever wraps them later.
        max_width: the most features of an input of which n × n numbers are kept.

    Attributes:
        modules: linear layers of the blocks, by name.
        heads: the layer that makes the logits, by name, if it is a linear one.
        moments: by the first layer that reads an input Σ E[x xᵀ], (n, n) or its diagonal (n,), and under "tokens" (V,)
            Σ of each token's share; float32, on the CPU.
        bases: by layer Q (n, n), or None for the features themselves, and u (n,), where its weight is.
    """

    def __init__(self, base: nn.Module, max_width: int) -> None:
        self.max_width = max_width
        self.modules: dict[str, Linear] = {}
        self._readers: dict[str, str] = {}
        for block in find_blocks(base):
            for part in (block.attention, block.mlp):
                self.modules |= {**part.into, part.out_name: part.out}
                self._readers |= {**dict.fromkeys(part.into, next(iter(part.into))), part.out_name: part.out_name}
        model: Any = base  # of transformers, which no module here imports
        output = model.get_output_embeddings()
        self.heads = {
            name: module for name, module in base.named_modules() if module is output and isinstance(module, nn.Linear)
        }
        self._readers |= {name: name for name in self.heads}
        self.embedding = model.get_input_embeddings()
        self.moments: dict[str, Tensor] = {}
        self.bases: dict[str, tuple[Tensor | None, Tensor]] = {}

    def weights(self) -> dict[str, nn.Parameter]:
        """Of the blocks' layers, by the layer's name."""
        return {name: module.weight for name, module in self.modules.items()}

    def observe(self, model: nn.Module, batches: Iterable[Batch], weight: float = 1.0) -> None:
        """Adds a text, times `weight`, as the model is now.

        Args:
            model: the base, or what wraps it.
        """
        layers = self.modules | self.heads
        first = {name: layers[name] for name in dict.fromkeys(self._readers.values())}
        wide = {name: layer for name, layer in first.items() if shape_of(layer)[1] > self.max_width}
        narrow = {name: layer for name, layer in first.items() if name not in wide}
        found = self._moments(model, batches, wide, narrow)
        tokens = torch.zeros(self.embedding.num_embeddings, dtype=torch.float64)
        for batch in batches:
            kept = batch["input_ids"][answer_tokens(batch, "all")]
            tokens += torch.bincount(kept.cpu(), minlength=len(tokens))
        if not tokens.any():
            raise ValueError("batches: they were empty the second time; give what can be iterated over more than once")
        found[_TOKENS] = (tokens / tokens.sum()).float()
        self.take({name: weight * moment + self.moments.get(name, 0.0) for name, moment in found.items()})

    @staticmethod
    def _moments(
        model: nn.Module, batches: Iterable[Batch], wide: Mapping[str, nn.Module], narrow: Mapping[str, nn.Module]
    ) -> dict[str, Tensor]:
        """Means per token, on the CPU: (n,) for inputs of wide layers, (n, n) for narrow ones.

        The sums on the device, the largest tensors there, are freed when this returns.
        """
        watches, totals = energy_watches(wide)
        probe = InputProbe(model, narrow, tokens="all") if narrow else None
        seen = stream(model, [*watches, *(probe.watches() if probe else ())], batches, tokens="all")
        found = {name: total.cpu() / seen for name, total in totals.items()}
        if probe:
            for name, halves in probe.result().halves.items():
                found[name] = (halves[0].moment + halves[1].moment).cpu() / seen
        return found

    def take(self, moments: Mapping[str, Tensor]) -> None:
        """Takes all moments, as `observe` left them."""
        self.moments, found = dict(moments), {}
        texts = float(self.moments[_TOKENS].sum(dtype=torch.float64))
        layers = self.modules | self.heads
        for name, moment in self.moments.items():
            if name != _TOKENS:
                weight = layers[name].weight
                values, vectors = moment.to(weight.device, torch.float64), None
                dtype = torch.promote_types(weight.dtype, torch.float32)
                if values.dim() == 2:
                    values, vectors = torch.linalg.eigh(values)
                    values, vectors = values.clamp(min=0), vectors.to(dtype)
                mean = values.mean()
                # An input that is always zero has no direction that is used.
                found[name] = vectors, (values * texts / mean if mean > 0 else values).to(dtype)
        self.bases = {name: found[reader] for name, reader in self._readers.items()}

    def token_shares(self) -> Tensor:
        """(V,), summed over texts, where the embedding is."""
        return self.moments[_TOKENS].to(self.embedding.weight.device)

    def share_taken(self, name: str, matrix: Tensor) -> float:
        """Share of the energy of a gradient or a change (m, n) of a layer that is in what earlier domains use."""
        basis, use = self.bases[name]
        matrix = matrix.to(use.device, use.dtype)
        energies = (matrix if basis is None else matrix @ basis).square().sum(0, dtype=torch.float64)
        total, use = float(energies.sum()), use.double()
        return float(energies @ (use / (1 + use))) / total if total else 0.0

    def surviving(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """By layer of the blocks, the share of a new domain's gradient that is outside, see `surviving_shares`."""
        return surviving_shares(model, self.weights(), batches, self.share_taken)

    def account(self, name: str) -> dict[str, Any]:
        """`width`, `used` and `free` of a layer's input directions, see `sparse_cl.probes.capacity.Layers`."""
        use = self.bases[name][1]
        used = round(float((use / (1 + use)).sum(dtype=torch.float64)))
        return {"width": len(use), "used": used, "free": len(use) - used}
