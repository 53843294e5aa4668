"""Planted activations, and a probe that stores every one of them."""

import torch
from torch import nn

from sparse_cl.probes.activation import ActivationProbe


class Given(nn.Module):
    """A model whose layers' activations are its inputs: (batch, length, layers, neurons)."""

    def __init__(self, layers=1):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))

    def forward(self, values):
        return [layer(values[..., number, :]) for number, layer in enumerate(self.layers)]

    @property
    def watched(self):
        return {f"layer{number}": layer for number, layer in enumerate(self.layers)}


def scored(values, batch_size=4, **settings):
    """Scores of activations (sequences, length, layers, neurons)."""
    model = Given(values.shape[2])
    probe = ActivationProbe(model, model.watched, **settings)
    return probe.run(values.split(batch_size))


def planted(generator, active, width, sequences=16, length=8, high=10.0):
    """(sequences, length, 1, width): noise, and far above it the neurons that are active."""
    values = torch.randn(sequences, length, 1, width, generator=generator)
    values[..., active] += high
    return values


def record(model, where, batches, tokens):
    """Everything that passes a place, rows of the tokens that count, in float64: where(model, add) hooks it."""
    seen = []
    handles = where(model, lambda value: seen.append(value.detach()))
    rows = []
    with torch.no_grad():
        for batch in batches:
            seen.clear()
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            rows.append(seen[0][tokens(batch)].double())
    for handle in handles:
        handle.remove()
    return rows
