"""Conversations as one text, and where the assistant's turns stand in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .records import ASSISTANT, DataError

_MARK = "turn{}of8c1f"
"""Stands for the content of an assistant's turn, to see what a template puts around it."""


@dataclass(frozen=True)
class Turns:
    """A conversation as one text.

    Attributes:
        text: all of it.
        spans: for each of the assistant's turns in order: where its content begins and ends, and where what ends the
            turn (as `<|im_end|>`) ends.
        special: whether the tokenizer is to put its own special tokens (BOS) before it; a template did that already.
    """

    text: str
    spans: list[tuple[int, int, int]]
    special: bool


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], where: str) -> Turns:
    """The conversation by the tokenizer's chat template.

    A tokenizer without a template: the turns' contents, each but the assistant's with a line break after it, the
    assistant's with the end-of-sequence; roles are not written. One question and its answer are then what a prompt
    and its response are.

    Raises:
        DataError: a tool is called and there is no template; the template refuses the conversation, or changes it so
            that its turns are not found again; `where` is named.
    """
    if not getattr(tokenizer, "chat_template", None):
        if any(turn.get("tool_calls") for turn in messages):
            raise DataError(
                f"{where}: the tokenizer has no chat template, which alone says how a tool is called; give it one, or "
                "leave the record out"
            )
        return _plain(messages, tokenizer.eos_token or "\n")

    def apply(messages: Sequence[dict[str, Any]], prompting: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompting)
        except Exception as error:  # whatever the template's own code raises
            raise DataError(f"{where}: the tokenizer's chat template refuses the conversation: {error}") from error

    text = apply(messages)
    turns = [number for number, turn in enumerate(messages) if turn["role"] == ASSISTANT]
    found = None
    if not any(messages[number].get("tool_calls") for number in turns):
        marks = {number: _MARK.format(number) for number in turns}
        around = apply([{**turn, "content": marks.get(n, turn["content"])} for n, turn in enumerate(messages)])
        found = _between(text, around, list(marks.values()), [messages[number]["content"] for number in turns])
    if found is None:
        found = []
        for number in turns:
            before, after = apply(messages[:number], True), apply(messages[: number + 1])
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                raise DataError(
                    f"{where}: the tokenizer's chat template changes the assistant's turn {number} so that it is not "
                    "found in the conversation; give `prompt` and `response` instead"
                )
            found.append((len(before), len(after)))
    end = _end_of_turn(apply, messages, turns[-1])
    return Turns(text, [_ended(text, begin, stop, end) for begin, stop in found], special=False)


def _plain(messages: Sequence[dict[str, Any]], end: str) -> Turns:
    text, spans = "", []
    for turn in messages:
        begin = len(text)
        text += turn["content"]
        if turn["role"] == ASSISTANT:
            spans.append((begin, len(text), len(text) + len(end)))
        text += end if turn["role"] == ASSISTANT else "\n"
    return Turns(text, spans, special=True)


def _between(text: str, around: str, marks: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where the contents stand in `text`, from the same text with marks in their places; None: they are not found."""
    pieces = []
    for mark in marks:
        piece, found, around = around.partition(mark)
        if not found or mark in around:
            return None
        pieces.append(piece)
    pieces.append(around)
    if not text.startswith(pieces[0]) or not text.endswith(pieces[-1]):
        return None
    spans, begin = [], len(pieces[0])
    for number, (piece, content) in enumerate(zip(pieces[1:], contents, strict=True), 1):
        exact = (begin + len(form) for form in (content, content.strip()) if text.startswith(form + piece, begin))
        last = len(text) - len(piece) if number == len(contents) else text.find(piece, begin)
        end = last if number == len(contents) else next(exact, last)
        if end < begin:
            return None
        spans.append((begin, end))
        begin = end + len(piece)
    return spans


def _end_of_turn(apply: Any, messages: Sequence[dict[str, Any]], last: int) -> str:
    """What the template writes after an assistant's content where nothing follows; no white space at its end."""
    mark = _MARK.format(last)
    turn = {key: value for key, value in messages[last].items() if key != "tool_calls"}
    end = apply([*messages[:last], {**turn, "content": mark}]).rpartition(mark)[2]
    return end.rstrip() or end


def _ended(text: str, begin: int, stop: int, end: str) -> tuple[int, int, int]:
    """The span of a turn's content and of its end, which may be in the span already."""
    inside = len(text[begin:stop].rstrip()) + begin
    if end and text.endswith(end, begin, inside):
        return begin, inside - len(end), inside
    return begin, stop, stop + len(end) if text.startswith(end, stop) else stop
