from __future__ import annotations

import pytest
import torch

from sparse_cl.models.losses import answer_loss, mean_loss
from sparse_cl.models.passes import IGNORED

IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 9, 10, 11, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def nats(model, row, place):
    """-ln p of the token at `place`, of a sequence alone in its batch."""
    return -model(input_ids=IDS[row : row + 1, :place]).logits[0, -1].log_softmax(-1)[IDS[row, place]]


def test_each_labelled_token_counts_once_given_all_before_it(tiny_llama):
    model = tiny_llama.double()
    labels = torch.full_like(IDS, IGNORED)
    labels[0, 3:] = IDS[0, 3:]
    labels[1, 2:4] = IDS[1, 2:4]
    loss, tokens = answer_loss(model, {"input_ids": IDS, "attention_mask": MASK, "labels": labels})
    expected = sum(nats(model, row, place) for row, place in [(0, 3), (0, 4), (0, 5), (1, 2), (1, 3)])
    assert tokens == 5
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_without_labels_all_attended_tokens_but_the_first_count(tiny_llama):
    model = tiny_llama.double()
    batch = {"input_ids": IDS, "attention_mask": MASK}
    expected = sum(nats(model, row, place) for row, last in [(0, 6), (1, 4)] for place in range(1, last))
    loss, tokens = answer_loss(model, batch)
    assert tokens == 8
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


def test_mean_is_over_tokens_not_over_batches_and_the_mode_is_put_back(tiny_llama):
    model = tiny_llama.double().train()
    batches = [{"input_ids": IDS[:1], "attention_mask": MASK[:1]}, {"input_ids": IDS[1:, :3]}]
    expected = sum(nats(model, row, place) for row, last in [(0, 6), (1, 3)] for place in range(1, last)) / 7
    assert mean_loss(model, batches) == pytest.approx(expected.item(), rel=1e-10)
    assert all(module.training for module in model.modules())


def test_what_has_no_next_token_asks_for_a_loss():
    with pytest.raises(ValueError, match=r"no next token.*loss=lambda"):
        answer_loss(torch.nn.Linear(2, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="domain empty"):
        mean_loss(torch.nn.Linear(2, 3), [])
