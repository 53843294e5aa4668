"""What a method takes, counted by running its own code on tensors without values."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch
from torch import Tensor

from sparse_cl.four_domains.state import optimizer_state_bytes
from sparse_cl.methods import Method, method_named
from sparse_cl.methods.lora import LoRA
from sparse_cl.methods.memory_method import FreshAdapters
from sparse_cl.models.parts import find_blocks
from sparse_cl.models.sharding import split

from .dry import DryRun, dry_run
from .model import Workload, build
from .split import imagined, policy

DEPTHS, SPLIT_DEPTHS = (2, 4), (3, 5)
"""Blocks of the two models that stand for a deeper one with equal blocks: what is counted is linear in their number.

Of a model that is split the peaks are from three on: two blocks are whole while gradients of a third are summed.
"""
HEAD = "head and loss"
FORWARD, BACKWARD, STEP, AROUND = PHASES = (
    "forward pass and loss",
    "backward pass",
    "optimizer's step",
    "around a domain",
)

PASS = "a pass around a domain"
"""Apart from the rest of `AROUND` until all is counted: the peak of each is linear in the number of blocks, but not the
higher of both."""

Count = dict[str, Any]
"""Bytes on the device in the last domain: "weights", "gradients", "state" (the optimizer's), "kept" (by the method),
"activations" (what a forward pass leaves for the backward pass),
"gathered" (most of what is whole of split weights at a time), "logits" (with what the loss makes of them in the
forward pass), and "peaks" in each of `PHASES`. Of a forward pass: "forward" FLOPs of matrix products, and bytes
"forward_moved", which all other ops read and write. Of a step of training in each domain: FLOPs of "passes" and of
"steps" (the optimizer's), and bytes "moved" and "sent" to other GPUs in both. "settings" and a "remark"."""


class NotPlanned(Exception):
    """A method's code needs values that a dry run does not have; the text says what failed."""


def count(
    method: str, config: Any, work: Workload, *, name: str = "model", gpu: bool = True, gpus: int = 1, **options: Any
) -> Count:
    """What a method takes on the model of a configuration; one with more blocks than `DEPTHS`, all equal, is not run.

    Args:
        name: the model's, for errors.
        gpu: whether the device is a GPU: torch's optimizers then step all parameters at once, and what code moves to
            the CPU is not on it.
        gpus: over how many the model is split. All that is counted is one's.
        options: of the method's constructor.

    Raises:
        ValueError: no such method, an option that it refuses, or a model that it cannot train.
        NotPlanned: the method's code cannot be run without values.
    """
    make = method_named(method)

    def run(blocks: int | None) -> Count:
        model, made = build(config, name, work.precision, blocks), make(**options)
        try:
            with imagined(gpus) as mesh:
                return _domains(made, model, work, gpu, mesh)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(".")
            raise NotPlanned(f"its code does not run on tensors without values ({reason})") from error

    if gpus > 1 and torch.distributed.is_initialized():
        raise ValueError("gpus: the other processes are imagined, but this one is one of several; start it by itself")
    whole = build(config, name, work.precision)
    make(**options).check(whole)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and work.length > limit:
        raise ValueError(f"length: expected at most the model's context of {limit} tokens, got {work.length}")
    blocks = find_blocks(whole)
    # Else each full garbage collection of a dry run goes through all that transformers and torch have imported.
    gc.collect()
    gc.freeze()
    shapes = [[(name, p.shape) for name, p in block.module.named_parameters()] for block in blocks]
    few, more = DEPTHS if gpus == 1 else SPLIT_DEPTHS
    if len(blocks) <= more or any(shape != shapes[0] for shape in shapes):
        found = run(None)
    else:
        found = _along(run(few), run(more), (len(blocks) - few) / (more - few))
    found["peaks"][AROUND] = max(found["peaks"][AROUND], found["peaks"].pop(PASS))
    return found


def _along(a: Any, b: Any, way: float) -> Any:
    """a + way (b - a), for each number of two counts."""
    if isinstance(a, dict):
        return {key: _along(value, b[key], way) for key, value in a.items()}
    if isinstance(a, list):
        return [_along(x, y, way) for x, y in zip(a, b, strict=True)]
    return a if a == b else round(a + way * (b - a))


def _domains(method: Method, model: Any, work: Workload, gpu: bool, mesh: Any) -> Count:
    """Runs every domain, with a step in each."""
    run = DryRun(model.get_output_embeddings().weight.shape[1], gpu)
    run.share = work.used / work.domains
    measured: list[Count] = []
    state: list[Count] = []
    with warnings.catch_warnings(), dry_run(run):
        warnings.simplefilter("ignore")
        # Of text, many rows of an embedding are used.
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(work.batch_size * work.length).view(work.batch_size, -1) % vocabulary
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        model.to_empty(device="cpu").tie_weights()
        # An adapter is made of the whole model, and then split with it.
        late = isinstance(method, FreshAdapters | LoRA)
        if mesh is not None and not late:
            split(model, mesh, mp_policy=policy(work.precision))
        if work.checkpointing:
            model.gradient_checkpointing_enable()
        run.peaks[PASS] = 0
        model.register_forward_pre_hook(lambda *_: run.passes(AROUND, PASS))
        model.register_forward_hook(lambda *_: run.passes(PASS, AROUND))
        for _ in range(work.domains):
            run.begin(AROUND)
            model = method.before_domain(model, [batch]).train()
            if mesh is not None and late:
                split(model, mesh, mp_policy=policy(work.precision))
                late = False
            optimizer = method.make_optimizer(model, 1e-3)
            measured.append(_step(run, method, model, optimizer, batch, work))
            run.begin(AROUND)
            method.after_domain(model, [batch])
            # What has come to rest stays: the domains that follow are as this one was.
            state.append({**measured[-1], **run.peaks})
            if len(state) > 1 and state[-1] == state[-2]:
                break
    measured += [measured[-1]] * (work.domains - len(measured))
    found = {
        **measured[-1],
        "peaks": {phase: run.peaks[phase] for phase in (*PHASES, PASS)},
        "settings": method.settings(),
    }
    return found | {key: [one[key] for one in measured] for key in ("passes", "steps", "moved", "sent")}


def _step(run: DryRun, method: Method, model: Any, optimizer: Any, batch: Any, work: Workload) -> Count:
    """One step of training, and what there is at its end."""
    for group in optimizer.param_groups if run.gpu else ():
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # as torch chooses for parameters on a GPU
    run.peaks |= dict.fromkeys((FORWARD, BACKWARD, STEP), 0)
    run.begin(FORWARD)
    run.flops = run.moved = run.sent = 0
    before = at_head = run.live
    whole = 0

    def watch(head: Any, given: Any) -> None:
        nonlocal at_head, whole
        at_head, whole = run.live, run.gathered_now()
        run.begin(HEAD)
        # When the gradient of what enters the head is there, the logits have gone.
        if given[0].requires_grad:
            given[0].register_hook(lambda gradient: run.begin(BACKWARD))

    hook = model.get_output_embeddings().register_forward_pre_hook(watch)
    with torch.autocast("cpu", torch.bfloat16, enabled=work.precision == "mixed"):
        loss = model(**batch, use_cache=False).loss
    hook.remove()
    run.begin(FORWARD)
    at_loss = run.peaks.pop(HEAD)
    run.peaks[FORWARD] = max(run.peaks[FORWARD], at_loss)
    forward, forward_moved = run.flops, run.moved
    penalty = method.penalty(model)
    (loss if penalty is None else loss + penalty).backward()
    del loss, penalty
    run.begin(STEP)
    at_step, passes = run.live, run.flops
    # The leaves of active layers are in the optimizer's state, as masters.
    weights = [t for n, t in (*model.named_parameters(), *model.named_buffers()) if not n.endswith(".active")]
    held = {
        "weights": run.bytes_of(weights),
        "gradients": run.bytes_of(p.grad for p in model.parameters() if p.grad is not None),
    }
    kept = at_step - sum(held.values()) - optimizer_state_bytes(optimizer) - run.bytes_of(batch.values())
    held["kept"] = max(0, kept)
    forward_and_backward = run.moved, run.sent
    optimizer.step()
    run.flops, (run.moved, run.sent) = passes, forward_and_backward
    if run.gathered:  # DTensors have found out in the first step, by whole tensors, what shapes results have
        run.peaks[STEP] = run.live
    optimizer.step()  # which does not make the state any more
    for phase in (FORWARD, BACKWARD):  # in later steps the state is there from the start
        run.peaks[phase] += run.live - at_step
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    found = {
        **held,
        "state": optimizer_state_bytes(optimizer),
        "activations": at_head - before - whole,
        "gathered": run.gathered,
        "logits": at_loss - at_head,
        "forward": forward,
        "forward_moved": forward_moved,
        "passes": passes,
        "steps": run.flops - passes,
        "moved": run.moved,
        "sent": run.sent,
        "remark": "its optimizer keeps moments in bfloat16 and no master copy: small updates are lost to rounding. "
        "--precision mixed keeps float32 weights" * any(x.dtype == torch.bfloat16 for x in states),
    }
    optimizer.zero_grad()
    return found
