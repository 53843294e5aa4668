"""Scores of a causal language model on one domain, and on a plain text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sparse_cl.data.encoding import Example, encode, encode_prompt, encode_record, pad, text_windows
from sparse_cl.models.generating import generating_by
from sparse_cl.models.head import logits_only_at
from sparse_cl.models.passes import evaluation

from .domains import Domain

METRICS = ("bits_per_byte", "accuracy", "exact_match")
ANSWER_MARKS = ("####", "The answer is")


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def response_nats(model: nn.Module, examples: Sequence[Example], batch_size: int = 16) -> list[float]:
    """−ln p of what is scored of each example given what stands before it, in nats (`Example.spans`)."""
    device = next(model.parameters()).device
    # Batches of like lengths waste less on padding.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    nats = [0.0] * len(examples)
    for indices in _batches(order, batch_size):
        ids, mask = pad([examples[i].input_ids for i in indices], 0, device)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        for row, i in enumerate(indices):
            for start, end in examples[i].spans:
                # The first id of all has no prediction: without a prompt or a BOS it goes unscored.
                scored[row, max(start, 1) : end] = True
        before = scored.roll(-1, 1)
        with logits_only_at(model, before):
            logits = model(input_ids=ids, attention_mask=mask).logits
        predictions = logits[before] if logits.shape[:2] == ids.shape else logits.flatten(0, 1)
        counts = scored.sum(1).tolist()
        # A record at a time: float32 of all logits at once would double the memory of a large vocabulary.
        for i, own, answers in zip(indices, predictions.split(counts), ids[scored].split(counts), strict=True):
            losses = nn.functional.cross_entropy(own.float(), answers, reduction="none")
            nats[i] = losses.double().sum().item()
    return nats


def bits_per_byte(
    model: nn.Module, tokenizer: Any, records: Sequence[dict], max_length: int, batch_size: int = 16
) -> float:
    """−log2 p of what is learned of the records (responses, the assistant's turns, texts) over its UTF-8 bytes, all
    records together.

    Comparable between tokenizers. A truncated response (see `encode`) counts with the part that is kept.
    """
    examples = [encode_record(tokenizer, record, max_length) for record in records]
    total = sum(response_nats(model, examples, batch_size))
    return total / math.log(2) / sum(example.scored_bytes for example in examples)


@torch.no_grad()
def text_bits_per_byte(model: nn.Module, tokenizer: Any, text: str, max_length: int, batch_size: int = 16) -> float:
    """Bits per UTF-8 byte of a plain text, in windows of `max_length` tokens that do not overlap (`text_windows`).

    A first token without a BOS before it has no context and is not scored; nor are its bytes counted.
    """
    windows = [window for window in text_windows(tokenizer, text, max_length) if window.scored_bytes]
    if not windows:
        raise ValueError("the text is too short to be scored: need at least 2 tokens")
    nats = sum(response_nats(model, windows, batch_size))
    return nats / math.log(2) / sum(window.scored_bytes for window in windows)


@torch.no_grad()
def drift_nats(base: nn.Module, tuned: nn.Module, windows: Sequence[Sequence[int]], batch_size: int = 4) -> float:
    """KL(base ‖ tuned) of the next token's distribution, in nats, mean over the tokens of a text.

    Args:
        base, tuned: of one vocabulary; both are evaluated as they are, in float32 from the logits on.
        windows: ids; a token's context is what stands before it in its window.
    """
    total = torch.zeros((), dtype=torch.float64)
    for batch in _batches(windows, batch_size):
        by_model = []
        for model in (base, tuned):
            ids, mask = pad(batch, 0, next(model.parameters()).device)
            by_model.append(model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)[mask.bool()])
        p, q = by_model[0], by_model[1].to(by_model[0].device)
        total += (p.exp() * (p - q)).sum(dtype=torch.float64).cpu()
    return total.item() / sum(map(len, windows))


def choice_continuations(record: dict) -> tuple[str, list[str]]:
    """What is given after the prompt, and the continuation of each choice, in the form of the record's response.

    The response's reasoning is left out, since it gives the answer away: given is the mark of the answer ("The
    answer is", "####") as it stands in the response, or nothing where there is none. Letters: "The answer is (B)
    text." becomes " (A) …", " (B) …"; "#### B" becomes " A", " B".
    """
    choices, answer, response = record["choices"], str(record["answer"]), record["response"]
    own = choices[record["answer_index"]]
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    labels = letters if answer == letters[record["answer_index"]] != own else choices
    mark = _last_mark(response)
    form = response[response.rfind(mark) + len(mark) :] if mark else response
    slot = f"({answer})" if f"({answer})" in form else answer
    before, found, after = form.partition(slot)
    if not found:
        return "", list(choices)
    return mark, [
        before + slot.replace(answer, label) + after.replace(own, choice, 1)
        for label, choice in zip(labels, choices, strict=True)
    ]


def _last_mark(response: str) -> str:
    return max((mark for mark in ANSWER_MARKS if mark in response), key=response.rfind, default="")


def accuracy(model: nn.Module, tokenizer: Any, records: Sequence[dict], max_length: int, batch_size: int = 16) -> float:
    """Part of the records whose right choice is the likeliest one.

    A choice's score is the log-likelihood of its continuation (`choice_continuations`) over the continuation's
    UTF-8 bytes, as `acc_bytes` of EleutherAI's lm-evaluation-harness (`benchmarks/harness` has these tasks for it).
    """
    examples = []
    for record in records:
        given, continuations = choice_continuations(record)
        examples += [encode(tokenizer, record["prompt"], text, max_length, separator=given) for text in continuations]
    nats = response_nats(model, examples, batch_size)
    scores = iter([-nat / example.scored_bytes for nat, example in zip(nats, examples, strict=True)])
    right = 0
    for record in records:
        of_choices = list(itertools.islice(scores, len(record["choices"])))
        right += of_choices.index(max(of_choices)) == record["answer_index"]
    return right / len(records)


def extract_answer(text: str) -> str:
    """The answer in a response: what follows the last "####" or "The answer is" on its line, else the whole text.

    Stripped of white space, a final full stop, and thousands separators in numbers.
    """
    mark = _last_mark(text)
    if mark:
        text = text[text.rfind(mark) + len(mark) :].lstrip().partition("\n")[0]
    text = text.strip().removesuffix(".").strip()
    return text.replace(",", "") if text.replace(",", "").replace(".", "").lstrip("-").isdigit() else text


@torch.no_grad()
def continuations(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, max_prompt: int) -> list[str]:
    """The greedy continuation of each prompt, in one batch; of too long a prompt the beginning is left out.

    Whatever generation_config the checkpoint brings does not count.

    Args:
        new_tokens, max_prompt: at most, in tokens.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # A model may have more rows than its tokenizer has tokens, and not every tokenizer decodes what it does not know.
    known = set(tokenizer.get_vocab().values())
    encoded = [encode_prompt(tokenizer, prompt, max_prompt) for prompt in prompts]
    ids, mask = pad(encoded, pad_id, next(model.parameters()).device, left=True)
    settings = {"max_new_tokens": new_tokens, "pad_token_id": pad_id, "eos_token_id": tokenizer.eos_token_id}
    with generating_by(model, do_sample=False, **settings):
        generated = model.generate(input_ids=ids, attention_mask=mask)
    written = [[token for token in row if token in known] for row in generated[:, ids.shape[1] :].tolist()]
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def exact_match(model: Any, tokenizer: Any, records: Sequence[dict], max_length: int, batch_size: int = 32) -> float:
    """Part of the records where the greedy continuation gives the answer (`extract_answer` of both).

    The continuation may be a quarter longer than the longest reference response of the batch, and 8 tokens.
    """
    right = 0
    for batch in _batches(records, batch_size):
        lengths = [len(tokenizer(r["response"], add_special_tokens=False)["input_ids"]) for r in batch]
        new_tokens = min(max(lengths) * 5 // 4 + 8, max_length // 2)
        texts = continuations(model, tokenizer, [r["prompt"] for r in batch], new_tokens, max_length - new_tokens)
        right += sum(
            extract_answer(text) == extract_answer(str(record["answer"]))
            for text, record in zip(texts, batch, strict=True)
        )
    return right / len(records)


def evaluate_domain(
    model: nn.Module,
    tokenizer: Any,
    domain: Domain,
    *,
    max_length: int,
    max_records: int,
    split: str = "test",
    metrics: Sequence[str] = METRICS,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, float | None]:
    """The scores of `METRICS` on one domain; None where it has no record of the kind, or is not asked for.

    Args:
        max_records: of each kind (test; eval with choices; eval with an answer), the first ones.
        metrics: those that are asked for.
        split: "test", or "validation" to choose settings by (bits per byte only).
        tick: called after each score, to move a progress bar.
    """
    runnable = [] if split == "validation" else [r for r in domain.eval if "tests" not in r]
    scored = {
        "bits_per_byte": (bits_per_byte, getattr(domain, split)),
        "accuracy": (accuracy, [r for r in runnable if r.get("choices")]),
        "exact_match": (exact_match, [r for r in runnable if not r.get("choices") and "answer" in r]),
    }
    scores: dict[str, float | None] = dict.fromkeys(METRICS)
    with evaluation(model):
        for metric, (score, records) in scored.items():
            if metric not in metrics:
                continue
            if records:
                scores[metric] = score(model, tokenizer, records[:max_records], max_length)
            tick()
    return scores
