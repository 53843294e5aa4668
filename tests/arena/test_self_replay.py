"""Self-replay: texts of the model as it is before the domain, in the places of the domain's own."""

from __future__ import annotations

import torch
from cases.methods import copy_of, domain
from torch.utils.data import Subset

from benchmarks.arena import SelfReplay


def written(model, seed=0):
    torch.manual_seed(seed)
    method = SelfReplay(share=0.25, texts=5, length=9)
    method.before_domain(model, domain(0))
    return method, method.training_data(2, [list(range(8))] * 3, 0)


def test_a_share_of_the_examples_is_the_model_s_own(tiny_llama):
    method, data = written(tiny_llama)
    assert isinstance(data, Subset) and len(data) == 8
    own = [item for item in (data[i] for i in range(8)) if isinstance(item, dict)]
    assert len(own) == 2
    for item in own:
        assert item["labels"] == item["input_ids"] and len(item["input_ids"]) == 9 == len(item["attention_mask"])
        assert item["input_ids"][0] == tiny_llama.config.bos_token_id
    assert [data[i] for i in range(8) if not isinstance(data[i], dict)] == [
        i for i in range(8) if not isinstance(data[i], dict)
    ], "the others stand where they stood"


def test_texts_are_drawn_from_the_model_by_the_seed(tiny_llama):
    first, again = (written(copy_of(tiny_llama))[0]._own for _ in range(2))
    assert first == again != written(copy_of(tiny_llama), seed=1)[0]._own
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight.mul_(5)
    assert first != written(tiny_llama)[0]._own
