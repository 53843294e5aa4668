"""Forward passes that probes watch."""

import pytest
import torch
from torch import nn

from sparse_cl.models.passes import Watch, answer_tokens, call, stream


def batch(lengths, answers, left=False):
    """Token ids 1, 2, 3… in each sequence; the last `answers` of each are labelled."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        start = longest - length if left else 0
        ids[row, start : start + length] = torch.arange(1, length + 1)
        mask[row, start : start + length] = 1
        labels[row, start + length - answer : start + length] = ids[row, start + length - answer : start + length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Recorder:
    def __init__(self):
        self.rows, self.sequences = [], []

    def __call__(self, rows, sequences):
        self.rows.append(rows.clone())
        self.sequences.append(sequences)

    def all(self):
        return torch.cat(self.rows), torch.cat(self.sequences)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("all", [(0, [1, 2, 3]), (1, [1, 2, 3, 4, 5]), (2, [1, 2])]),
        ("text", [(0, [2, 3]), (1, [2, 3, 4, 5]), (2, [2])]),
        ("answers", [(0, [3]), (1, [4, 5]), (2, [2])]),  # of the third both are labelled, but its first is no answer
    ],
)
def test_rows_are_those_of_the_tokens_that_count_and_know_their_sequence(tokens, expected, left):
    embedding = nn.Embedding(8, 4)
    model = nn.Sequential()
    model.embed, model.head = embedding, nn.Linear(4, 2)
    model.forward = lambda input_ids, attention_mask: model.head(embedding(input_ids))
    seen, into = Recorder(), Recorder()
    watches = [Watch("embed", embedding, "output", seen), Watch("head", model.head, "input", into)]
    batches = [batch([3, 5], [1, 2], left), batch([2], [2], left)]
    kept = stream(model, watches, batches, tokens=tokens)
    rows, sequences = seen.all()
    assert kept == len(rows) == sum(len(ids) for _, ids in expected)
    assert sequences.tolist() == [number for number, ids in expected for _ in ids]
    assert torch.equal(rows, embedding.weight[torch.tensor([i for _, ids in expected for i in ids])])
    assert torch.equal(into.all()[0], rows)


def test_a_batch_without_labels_counts_its_text_and_a_tensor_all_its_rows():
    plain = {k: v for k, v in batch([3, 2], [1, 1]).items() if k != "labels"}
    assert torch.equal(answer_tokens(plain, "answers"), answer_tokens(plain, "text"))
    model, seen = nn.Linear(3, 2), Recorder()
    x = torch.randn(4, 5, 3)
    assert stream(model, [Watch("it", model, "input", seen)], [x, (x,)]) == 40
    rows, sequences = seen.all()
    assert torch.equal(rows, x.flatten(0, 1).repeat(2, 1))
    assert sequences.tolist() == [i for i in range(8) for _ in range(5)]


def test_only_the_last_logits_are_computed_and_what_is_watched_does_not_change(tiny_llama):
    head, hidden = Recorder(), Recorder()
    items = batch([6, 9], [2, 3])
    watches = [
        Watch("norm", tiny_llama.model.norm, "output", hidden),
    ]
    stream(tiny_llama, watches, [items], tokens="all")
    tiny_llama.lm_head.register_forward_pre_hook(lambda _, inputs: head(inputs[0], None))
    with torch.no_grad():
        whole = tiny_llama.model(items["input_ids"], items["attention_mask"]).last_hidden_state
        call(tiny_llama, items, logits=False)
    assert head.rows[0].shape[1] == 1
    torch.testing.assert_close(hidden.all()[0], whole[items["attention_mask"].bool()], rtol=0, atol=0)


def test_modes_and_hooks_are_put_back_also_after_an_error(tiny_llama):
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    modes = [module.training for module in tiny_llama.modules()]
    mlp = tiny_llama.model.layers[1].mlp

    def fail(rows, sequences):
        assert not any(module.training for module in tiny_llama.modules())
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        stream(tiny_llama, [Watch("mlp", mlp, "output", fail)], [batch([3], [1])])
    assert [module.training for module in tiny_llama.modules()] == modes
    assert not mlp._forward_hooks and not mlp._forward_pre_hooks


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named_with_their_batch(tiny_llama, bad):
    layers = {f"layer {i}": layer for i, layer in enumerate(tiny_llama.model.layers)}
    watches = [Watch(name, layer, "output", lambda rows, sequences: None) for name, layer in layers.items()]
    good, poisoned = batch([3], [1]), batch([4], [1])
    poisoned["input_ids"][0, 2] = 77
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[77] = bad
    with pytest.raises(ValueError, match="not finite in layer 0, batch 2"):
        stream(tiny_llama, watches, [good, poisoned])


def test_bad_input_says_what_is_wrong():
    model = nn.Linear(3, 2)
    ignore = lambda rows, sequences: None  # noqa: E731
    watch = Watch("it", model, "output", ignore)
    with pytest.raises(ValueError, match="got no batch; is the domain empty"):
        stream(model, [watch], [])
    with pytest.raises(ValueError, match="tokens: expected one of answers, text, all, got 'every'"):
        stream(model, [watch], [torch.zeros(1, 3)], tokens="every")
    with pytest.raises(ValueError, match="side of it: expected 'input' or 'output', got 'inside'"):
        stream(model, [Watch("it", model, "inside", ignore)], [torch.zeros(1, 3)])
    with pytest.raises(ValueError, match=r"idle \(Linear\) did not run in batch 1"):
        stream(model, [watch, Watch("idle", nn.Linear(2, 2), "output", ignore)], [torch.zeros(1, 3)])
    assert not model._forward_hooks


class Pooled(nn.Module):
    """A classifier of sequences: its score reads each one's last token alone."""

    def __init__(self, body):
        super().__init__()
        self.body, self.score = body.model, nn.Linear(16, 2)

    def forward(self, **inputs):
        return self.score(self.body(**inputs).last_hidden_state[:, -1])


def test_no_token_that_counts_is_an_error_and_pooled_rows_are_too(tiny_llama):
    unlabelled = batch([3], [0])
    with pytest.raises(ValueError, match=r"got 1 without any \(tokens='answers'\)"):
        stream(tiny_llama, [], [unlabelled])
    model = Pooled(tiny_llama)
    watch = Watch("score", model.score, "output", lambda rows, sequences: None)
    with pytest.raises(ValueError, match="score has 1 rows for the 3 tokens"):
        stream(model, [watch], [batch([3], [1])])


def test_a_head_that_is_watched_sees_every_token(tiny_llama):
    seen = []
    watch = Watch("head", tiny_llama.lm_head, "output", lambda rows, sequences: seen.append(rows))
    given = batch([3], [1])
    stream(tiny_llama, [watch], [given], tokens="all")
    with torch.no_grad():
        expected = tiny_llama(**{name: part for name, part in given.items() if name != "labels"}).logits
    assert torch.equal(torch.cat(seen), expected[0])
