"""Logits of some tokens alone: the same loss, the same gradients, the same scores."""

from __future__ import annotations

import pytest
import torch
from cases.families import FAMILIES, make

from sparse_cl.data.encoding import Example
from sparse_cl.four_domains.evaluate import response_nats
from sparse_cl.models.head import logits_at_labels, logits_only_at


def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (3, 7), generator=generator)
    labels = torch.where(torch.rand(3, 7, generator=generator) < 0.4, ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_labelled_tokens_needs_no_other_logits(family):
    model = make(family, FAMILIES[family]).double()
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, output: seen.append(output.shape))
    loss, gradients = loss_and_gradients(model, batch())
    with logits_at_labels(model, batch()) as inputs:
        own_loss, own_gradients = loss_and_gradients(model, inputs)
    hook.remove()
    assert seen == [(3, 7, 64), (1, int((batch()["labels"][:, 1:] != -100).sum()), 64)]
    torch.testing.assert_close(own_loss, loss, rtol=1e-12, atol=0)
    assert own_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-9, atol=1e-15)


def test_a_batch_that_counts_nothing_has_the_loss_that_it_had():
    model = make("Llama", FAMILIES["Llama"])
    nothing = {**batch(), "labels": torch.full((3, 7), -100)}
    expected = model(**nothing, num_items_in_batch=5).loss
    with logits_at_labels(model, nothing) as inputs:
        assert model(**inputs, num_items_in_batch=5).loss == expected == 0


def test_a_model_that_names_no_head_is_called_as_before():
    class Bare(torch.nn.Module):
        def forward(self, input_ids, labels=None, **others):
            return input_ids

    given = batch()
    with logits_at_labels(Bare(), given) as inputs:
        assert inputs is given
    with logits_only_at(Bare(), None):
        assert Bare()(**given).shape == (3, 7)


def test_of_a_pass_for_what_stands_before_there_is_one_token_s_logits():
    model = make("Llama", FAMILIES["Llama"])
    seen = []
    watching = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    whole = model(**batch()).logits
    with logits_only_at(model, None):
        torch.testing.assert_close(model(input_ids=batch()["input_ids"]).logits, whole[:1, :1])
    watching.remove()
    assert seen == [(3, 7, 16)] * 2, "what watched before sees all"


def test_scores_are_those_of_all_logits():
    model = make("Llama", FAMILIES["Llama"]).double()
    generator = torch.Generator().manual_seed(1)
    examples = [
        Example(ids := torch.randint(1, 60, (length,), generator=generator).tolist(), ids, spans, 0)
        for length, spans in [(5, ((0, 2), (3, 5))), (9, ((4, 9),)), (3, ())]
    ]
    found = response_nats(model, examples, batch_size=2)
    for example, nats in zip(examples, found, strict=True):
        ids = torch.tensor([example.input_ids])
        log_p = model(input_ids=ids).logits.detach().log_softmax(-1)[0]
        places = [i for start, end in example.spans for i in range(max(start, 1), end)]
        assert nats == pytest.approx(-sum(float(log_p[i - 1, ids[0, i]]) for i in places), rel=1e-6)
