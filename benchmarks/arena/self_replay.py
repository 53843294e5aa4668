"""Replay of texts that the model writes itself, before each domain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from sparse_cl.methods.base import Batch
from sparse_cl.methods.options import check_at_least
from sparse_cl.methods.replay import Replay
from sparse_cl.models.generating import generating_by
from sparse_cl.models.passes import evaluation


class SelfReplay(Replay):
    """Replay without old data: before each domain the model writes texts, which it goes on to be trained on.

    They are drawn token by token at temperature 1 from the first token on: the base's text and what earlier domains
    have made of it. Prompts are not trained on, so that a prompt with its response, which LAMOL (Sun et al. 2020) has
    the model write, is seldom among them. In the first domain too.

    Args:
        share: of a domain's examples that are such texts.
        texts, length: how many are written, and tokens of each.
    """

    name = "self-replay"
    options = ("share", "texts", "length")

    def __init__(self, share: float = 0.05, texts: int = 64, length: int = 128) -> None:
        super().__init__(share)
        self.texts, self.length = check_at_least("texts", texts, 1), check_at_least("length", length, 2)
        self._own: Any = []  # a list is a dataset

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        super().before_domain(model, batches)
        written = _written(model, self.texts, self.length)
        self._own = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in written]
        return model

    def training_data(self, number: int, datasets: Sequence[Dataset], seed: int) -> Dataset:
        return super().training_data(1, [self._own, datasets[number]], seed)


@torch.no_grad()
def _written(model: Any, texts: int, length: int, batch_size: int = 16) -> list[list[int]]:
    ends = model.config.eos_token_id
    first = model.config.bos_token_id
    first = first if first is not None else ends[0] if isinstance(ends, list) else ends
    if first is None:
        raise ValueError("self-replay: the model's config has no first and no end token that a text could begin with")
    device = next(model.parameters()).device
    found: list[list[int]] = []
    with evaluation(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(torch.initial_seed())
        while len(found) < texts:
            ids = torch.full((min(batch_size, texts - len(found)), 1), first, device=device)
            # Without an end, so that the next document follows.
            settings = {"max_new_tokens": length - 1, "pad_token_id": first, "eos_token_id": None}
            with generating_by(model, do_sample=True, top_k=0, **settings):
                found += model.generate(input_ids=ids, attention_mask=torch.ones_like(ids)).tolist()
    return found
