"""Texts that a model writes by itself: what it knows, without any data."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sparse_cl.data.encoding import pad
from sparse_cl.models.generating import generating_by
from sparse_cl.models.passes import evaluation
from sparse_cl.models.processes import by_first, processes

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@torch.no_grad()
def write_texts(
    model: Any, tokenizer: Any, *, texts: int, length: int, context: int, batch_size: int, seed: int
) -> list[dict[str, list[int]]]:
    """Texts that are drawn from the model, token by token, at temperature 1; items as those of `EncodedRecords`.

    A model with a chat template writes a user's message, and then its answer (as Magpie does, Xu et al. 2024); another
    one writes text from its first token on, one document after the other.

    Args:
        texts: how many.
        length: tokens of each, at most, without what a chat template writes before a message.
        context: tokens of each, at most, with it.
        batch_size: texts that are written at once.
        seed: of the draw. Processes that share a model return the same texts.

    Raises:
        ValueError: the tokenizer has no token that a text could begin with.
    """
    found: list[list[int]] = []
    with evaluation(model), torch.random.fork_rng(_cuda(model)), ExitStack() as stack:
        torch.manual_seed(seed)
        hidden = not processes().is_main_process
        bar = stack.enter_context(tqdm(total=texts, desc="writing texts", mininterval=0.5, disable=hidden))
        before = _before_a_message(tokenizer)
        room = context - len(before)
        if before and room < length // 2:
            warnings.warn(
                f"protect: the chat template writes {len(before)} tokens before a message, of {context} that fit, so "
                "the model writes plain text; better give --protect FILE.txt",
                stacklevel=3,
            )
            before, room = [], context
        while len(found) < texts:
            count = min(batch_size, texts - len(found))
            if before:
                found += _chats(model, tokenizer, before, count, min(length, room))
            else:
                found += _plain(model, tokenizer, count, min(length, room))
            bar.update(count)
    found = by_first(lambda: found)  # which on GPUs may differ in the last bit of a logit
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in found]


def _plain(model: Any, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise ValueError(
            "protect: the tokenizer has neither a first nor an end token that a text could begin with; give "
            "--protect FILE.txt or --protect none"
        )
    # Without an end, so that the next document follows.
    return _continued(model, tokenizer, [[first]] * count, length - 1, stop=False)


def _before_a_message(tokenizer: Any) -> list[int]:
    """What a chat template begins with, a system prompt too; nothing where there is no template, or it does not."""
    if not tokenizer.chat_template:
        return []
    whole = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    return tokenizer(whole.split(_MARK)[0], add_special_tokens=False)["input_ids"]


def _chats(model: Any, tokenizer: Any, before: list[int], count: int, length: int) -> list[list[int]]:
    asked = _continued(model, tokenizer, [before] * count, length // 4, stop=True)
    prompts = []
    for ids in asked:
        question = tokenizer.decode(ids[len(before) :], skip_special_tokens=True).strip()
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        # Tokens of a question that is read again may be more than were written.
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"][: len(before) + length - 1])
    room = len(before) + length - max(map(len, prompts))
    return _continued(model, tokenizer, prompts, min(room, length // 2), stop=True)


def _continued(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int, stop: bool
) -> list[list[int]]:
    """Prompts with what the model writes after them, to its end token where it is to stop there."""
    device = next(model.parameters()).device
    padding = tokenizer.pad_token_id
    ids, mask = pad(prompts, padding, device, left=True)
    ends = model.generation_config.eos_token_id if stop else None
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    settings = {"max_new_tokens": tokens, "pad_token_id": padding, "eos_token_id": ends or None}
    shared = processes().num_processes > 1  # then each pass takes all of them
    with generating_by(model, do_sample=True, top_k=0, **settings):
        written: Tensor = model.generate(input_ids=ids, attention_mask=mask, synced_gpus=shared)
    found = []
    for prompt, row in zip(prompts, written[:, ids.shape[1] :].tolist(), strict=True):
        stops = [place for place, token in enumerate(row) if token in ends]
        found.append([*prompt, *row[: stops[0] + 1 if stops else None]])
    return found


def _cuda(model: Any) -> list[torch.device]:
    return [device for device in {p.device for p in model.parameters()} if device.type == "cuda"]
