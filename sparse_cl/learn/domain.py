"""One domain: read, protect, train, remember, write."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

from sparse_cl.data import (
    SCORED,
    EncodedRecords,
    Records,
    check_records,
    check_text,
    cut_texts,
    hold_out,
    parse_columns,
    read_records,
    show,
)
from sparse_cl.four_domains.protection import in_windows, text_to_protect
from sparse_cl.four_domains.sequence import DomainBatches
from sparse_cl.four_domains.training import train
from sparse_cl.integrations import ContinualCallback
from sparse_cl.layout import is_sharded
from sparse_cl.methods.carried import Carried, fingerprint, save_carried
from sparse_cl.methods.lora import merged
from sparse_cl.models.loading import load_tokenizer, quiet
from sparse_cl.models.losses import mean_loss
from sparse_cl.models.parts import has_adapters
from sparse_cl.models.processes import check_processes, processes
from sparse_cl.models.sharding import split_over_all, whole_weights

from .own_texts import write_texts
from .said import say_moved, say_protected
from .settings import NONE, SELF, LearnSettings
from .source import Source
from .stream import ARGUMENTS, check_stream, domains_in, optimizer_of
from .work import Work

_CHECKPOINTS = 10
"""How often a run is saved on its way, so that one that was stopped goes on."""
_OWN_TOKENS = 128
"""Of a text that the model writes: what a few hundred use of its layers changes little after that, and waiting does."""


def learn(settings: LearnSettings, say: Callable[[str], object] = print) -> Path:
    """Does what the settings say, and returns the folder; a call that was stopped goes on.

    Everything is checked before anything is written.

    Raises:
        DataError, ValueError, OSError: bad input, a folder that holds something else, a full disk.
    """
    quiet()
    check_processes()
    if (count := processes().num_processes) > 1 and not settings.shard:
        raise ValueError(
            f"learn: expected one process, {count} were started; add --shard, which splits the model over them, or "
            "start it without torchrun"
        )
    if settings.shard and count == 1:
        raise ValueError(
            "shard: expected several processes to split the model over, there is one; start them by torchrun "
            "--nproc-per-node 2 -m sparse_cl learn …, or leave --shard out"
        )
    with warnings.catch_warnings():
        if not processes().is_main_process:
            warnings.simplefilter("ignore")
            return _learn(settings, lambda text: None)
        return _learn(settings, say)


def _learn(settings: LearnSettings, say: Callable[[str], object]) -> Path:
    work = Work(settings.out)
    source = Source(settings.model)
    tokenizer, rows = load_tokenizer(source.base, source.tokenizer)
    records, held = _read(settings, tokenizer, rows)
    file = None if settings.protect in (SELF, NONE) else settings.protect
    text = text_to_protect(file, None, None, settings.max_length)
    if text is not None:
        check_text(text, "--protect", tokenizer, rows)
    if settings.show_data:
        say(show(records, tokenizer, settings.max_length))
        return settings.out
    steps = _steps(settings, len(records))
    if settings.stream:
        check_stream(settings, len(records), steps)
    read: dict[str, Any] = {
        "data": records.fingerprint,
        "eval_data": held.fingerprint,
        "model_files": source.fingerprint(),
    }
    if text is not None:
        read["text"] = hashlib.sha256(text.encode()).hexdigest()
    if settings.shard:
        read["processes"] = processes().num_processes  # each of which takes batches of its own
    work.claim({**settings.to_json(), **read})
    if work.is_done():
        say(f"{settings.out} holds this model; nothing is left to do")
        return settings.out
    say(f"Learns {records.describe()}" + ("" if settings.eval is None else f"; scores {held.describe()}"))
    _Domain(settings, source, tokenizer, records, held, text, work, say).run(steps)
    return settings.out


def _read(settings: LearnSettings, tokenizer: Any, rows: int) -> tuple[Records, Records]:
    """The records to learn and those to score."""
    given = parse_columns(settings.columns)
    for source in settings.data:
        if settings.out.resolve().is_relative_to(Path(source).expanduser().resolve()):
            raise ValueError(
                f"out: {settings.out} is inside --data {source}, whose files are all read as records; give the files, "
                f"as {source}/*.jsonl, or another --out"
            )
    records = read_records(settings.data, given)
    held = None if settings.eval is None else read_records([settings.eval], given, SCORED)
    for each in (records, held):
        if each is not None:
            check_records(each, tokenizer, rows, settings.max_length)
    kept, held = (records, held) if held is not None else hold_out(records, settings.seed)
    # Cut only now, so that no text stands on both sides.
    return cut_texts(kept, tokenizer, settings.max_length), cut_texts(held, tokenizer, settings.max_length)


class _Domain:
    """What one call holds."""

    def __init__(
        self,
        settings: LearnSettings,
        source: Source,
        tokenizer: Any,
        records: Records,
        held: Records,
        text: str | None,
        work: Work,
        say: Callable[[str], object],
    ) -> None:
        self.settings, self.source, self.tokenizer, self.work, self.say = settings, source, tokenizer, work, say
        self.method, self.text = settings.make_method(), text
        self.data = EncodedRecords(records.records, tokenizer, settings.max_length)
        self.held = EncodedRecords(held.records, tokenizer, settings.max_length)

    def run(self, steps: int) -> None:
        settings, method, stream = self.settings, self.method, self.settings.stream
        model, carried = self._begin()
        say_protected(method, carried, self.say)
        batches = DomainBatches(self.data, settings.batch_size, _device(model))
        scored = DomainBatches(self.held, settings.batch_size, _device(model), len(self.held))
        before = mean_loss(model, scored)
        transformers.set_seed(settings.seed)
        model = method.before_domain(model, batches)
        if settings.shard and not any(map(is_sharded, model.parameters())):
            model = split_over_all(model, _device(model))
        lr = settings.rate(adapters=has_adapters(model))
        self.work.begin()
        finding = [ContinualCallback(method, boundaries="auto", name=settings.out.name)] if stream else []
        hidden = not processes().is_main_process
        with tqdm(total=steps, desc=f"{method.name}: learning", mininterval=0.5, disable=hidden) as bar:
            train(
                model,
                self.data,
                transformers.DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100),
                lambda m: optimizer_of(method, m, lr) if stream else method.make_optimizer(m, lr),
                method.penalty,
                folder=self.work.checkpoints,
                steps=steps,
                batch_size=settings.batch_size,
                lr=lr,
                seed=settings.seed,
                bar=bar,
                autocast=settings.autocast,
                resume=self.work.last_checkpoint(),
                # A checkpoint is whole when what is protected is in it, too.
                callbacks=[*finding, self.work.marker()],
                **self._arguments(steps),
            )
        after = mean_loss(model, scored)
        if not math.isfinite(after):
            raise ValueError(
                f"lr: with {lr:g} training diverged, the loss is {after}. Delete {settings.out}, give a lower --lr"
            )
        found = {"records": len(self.data), "loss": {"before": before, "after": after}}
        entry = {"name": settings.out.name, "method": method.name, "options": method.settings(), "lr": lr}
        entries = [{**entry, "steps": steps, **found}]
        if stream:
            entries = domains_in(self.work.checkpoints, self.say)
            entries[-1] |= {"stream": found}
        else:
            method.after_domain(model, batches)
        entries[-1] |= {"settings": self.work.settings, "base_files": fingerprint(self.source.base)}
        self._write(model, carried, entries)
        scored_on = "that were held out" if settings.eval is None else "of --eval"
        self.say(f"Learned: {before:.3f} → {after:.3f} nats a token on {len(self.held)} records {scored_on}")
        if not stream:  # there it is known of the last domain alone
            say_moved(method, self.say)
        self.say(f"Written to {settings.out}: a model, and what the next call must not forget")

    def _begin(self) -> tuple[nn.Module, Carried]:
        """The model as the domain finds it, and what it must not forget, in the method's hands."""
        settings, method = self.settings, self.method
        dtype = getattr(torch, settings.dtype)
        model, carried = self.source.load(method, dtype, settings.shard)
        limit = _context(model) or settings.max_length
        if settings.max_length > limit:
            raise ValueError(f"max_length: expected at most the model's context of {limit}, got {settings.max_length}")
        carried = carried or Carried(None, [])
        fresh = carried.memory is None and not has_adapters(model)
        if not fresh and settings.protect not in (SELF, NONE):
            self.say(f"--protect {settings.protect} is not read: it is for what a model knows before its first domain")
        if fresh and settings.protect != NONE and method.protects:
            kept = self.work.protected()
            if kept is not None and kept.memory is not None:
                method.remember(model, kept.memory)
                carried = kept
            else:
                method.check(model)
                self._protect(model)
                carried = self.work.keep_protected(Carried(getattr(method, "memory", None), carried.domains))
        return model, carried

    def _protect(self, model: nn.Module) -> None:
        settings = self.settings
        if self.text is None:
            self.say(f"The model writes {settings.texts} texts, by which it is protected (--protect)")
            texts: Any = write_texts(
                model,
                self.tokenizer,
                texts=settings.texts,
                length=min(settings.max_length, _OWN_TOKENS),
                context=_context(model) or settings.max_length,
                batch_size=32,
                seed=settings.seed,
            )
        else:
            texts = in_windows(self.tokenizer, self.text, settings.max_length)
        transformers.set_seed(settings.seed)
        self.method.protect(model, DomainBatches(texts, settings.batch_size, _device(model), len(texts)))

    def _arguments(self, steps: int) -> dict[str, Any]:
        settings = self.settings
        return {
            "gradient_accumulation_steps": settings.gradient_accumulation,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "report_to": [] if settings.report_to == "none" else settings.report_to,
            "save_strategy": "steps",
            "save_steps": max(1, math.ceil(steps / _CHECKPOINTS)),
            "save_total_limit": 2,
            **(ARGUMENTS if settings.stream else {}),
            **settings.training_arguments(),
        }

    def _write(self, model: Any, carried: Carried, entries: list[dict[str, Any]]) -> None:
        given = {"state_dict": whole_weights(model)} if self.settings.shard else {}
        memory = getattr(self.method, "memory", None)
        kept = Carried(memory if memory is not None else carried.memory, [*carried.domains, *entries])

        def write(folder: Path) -> None:
            plain: Any = merged(model) if self.settings.merge else model
            plain.save_pretrained(folder, **given)
            self.tokenizer.save_pretrained(folder)
            if not self.settings.merge:
                self.method.save(folder)
            save_carried(folder, kept)

        self.work.finish(write)


def _steps(settings: LearnSettings, count: int) -> int:
    """Optimizer steps on so many records."""
    if settings.steps is not None:
        return settings.steps
    records = settings.batch_size * settings.gradient_accumulation * processes().num_processes
    return max(1, math.ceil(math.ceil(count / records) * settings.epochs))


def _context(model: Any) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
