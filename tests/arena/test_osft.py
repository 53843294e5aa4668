"""OSFT: no step enters the singular directions that stay; the rest is trained."""

from __future__ import annotations

import torch
from cases.methods import domain, learn, weights

from benchmarks.arena import OSFT
from sparse_cl.models.parts import linear_layers


def test_changes_keep_out_of_the_largest_singular_directions_of_each_domain_s_start(tiny_llama):
    method, model = OSFT(effective_rank=0.5), tiny_llama
    layers = {f"{name}.weight" for name in linear_layers(model)}
    for number in range(2):
        before = weights(model)
        model = learn(method, model, domain(number), steps=12)
        for name, after in weights(model).items():
            change = after.double() - before[name].double()
            if name not in layers:
                assert change.any()
                continue
            u, s, v = torch.linalg.svd(before[name].double(), full_matrices=False)
            rank = round(0.5 * len(s))
            inside = change @ v[:rank].mT, u[:, :rank].mT @ change
            assert change.norm() > 1e-3
            assert all(part.norm() <= 1e-5 * change.norm() for part in inside)
        assert all(p.requires_grad for p in model.parameters())
