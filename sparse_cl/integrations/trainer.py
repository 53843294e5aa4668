"""A callback for the Trainer of transformers and those of TRL."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_pt_utils import LengthGroupedSampler

from sparse_cl import storage
from sparse_cl.methods import Method, load_carried, save_carried
from sparse_cl.methods.carried import FOLDER
from sparse_cl.methods.memory_method import MemoryMethod
from sparse_cl.optim.active_gradients import active_gradients
from sparse_cl.optim.names import plain_optimizer
from sparse_cl.probes.boundaries import BoundaryDetector

from .domain import ADVICE, STATE, Domain
from .rewind import Rewind
from .stream import Stream

_STREAM = f"{FOLDER}/stream.pt"


class ActiveClipping(transformers.TrainerCallback):
    """Has `max_grad_norm` count the gradients of active entries alone, where the optimizer has masks of ours.

    `ContinualCallback` does so by itself.
    """

    _clipping = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clipping = active_gradients(plain_optimizer(kwargs["optimizer"]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clipping.close()


class ContinualCallback(transformers.TrainerCallback):
    """Trains one domain by a Trainer without forgetting those before.

        trainer = SFTTrainer(model, args, train_dataset=data, callbacks=[ContinualCallback(Elastic(), memory="1-code")])
        trainer.train()
        trainer.save_model()

    When training begins, the method looks at some of the trainer's records, and its protection is put behind the
    optimizer that the trainer made. At each step it is proven to be there. Logs show `old_output_drift`, the mean
    over parameters of the share of old outputs that has moved, and the largest. Checkpoints hold the protection's
    state, so that `resume_from_checkpoint` goes on with the same bits; and when training ends, what the model now
    remembers is written into `<output_dir>/sparse_cl/`, for the next domain's `memory`.

    Args:
        method: `Elastic` or `Orthogonal`. One that was used before goes on from what it remembers.
        memory: a model folder whose memory is gone on from, or a name on the Hub. None: the first domain, or the
            method knows.
        name: of the domain, for the history; the output folder's by default.
        records: how many training records the method may look at, before and after.
        checkpoint: the folder that training resumes from, where it is not `<output_dir>/checkpoint-<step>`.
        boundaries: "auto": the data are several domains one after another, not shuffled together, and a
            `BoundaryDetector` finds where each ends; the method then remembers it by about `records` records that were
            kept of it. Or a detector of your own. In one process only. TRL's packing sorts records by length, which
            mixes the domains; give it `packing_strategy="wrapped"`.
        rewind: with `boundaries`, what was learned of a new domain before it was noticed is undone. Before a batch that
            looks as if a new domain may begin, the trained weights and the optimizer's state are copied into host
            memory: one copy, kept while it looks so, and made in about one step of 20. At a boundary training goes
            back to them, moments and all, and the method remembers the domain as it was then. The Trainer's counters,
            the data and the rate's schedule go on: the few steps count as taken. A false alarm costs these steps, and
            has the domain remembered in two parts. False: the new domain's first steps are unprotected.

    Raises (in `trainer.train()`):
        ValueError: the method cannot train this model, or needs an optimizer of its own.
        RuntimeError: several devices in one process, DeepSpeed or FSDP1; an optimizer that steps other tensors than the
            model's; a checkpoint without the protection's state.
    """

    def __init__(
        self,
        method: Method,
        *,
        memory: str | Path | None = None,
        name: str | None = None,
        records: int = 128,
        checkpoint: str | Path | None = None,
        boundaries: str | BoundaryDetector | None = None,
        rewind: bool = True,
    ) -> None:
        if not isinstance(method, Method):
            raise TypeError(f"method: expected a method such as Elastic(), got {method!r}")
        if not (boundaries is None or boundaries == "auto" or isinstance(boundaries, BoundaryDetector)):
            raise ValueError(f"boundaries: expected 'auto', a BoundaryDetector or None, got {boundaries!r}")
        self.method, self.memory, self.name, self.records = method, memory, name, records
        self.checkpoint, self.boundaries, self.rewind = checkpoint, boundaries, rewind
        self.domain: Domain | None = None
        self._stream: Stream | None = None
        self._began = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kind = str(args.parallel_mode).rpartition(".")[2]
        flattened = any(type(m).__name__ == "FullyShardedDataParallel" for m in kwargs["model"].modules())
        if kind == "NOT_DISTRIBUTED" or getattr(args, "deepspeed", None) or flattened:
            raise RuntimeError(
                f"ContinualCallback: training is spread over devices or processes ({kind.lower()}) so that the "
                f"protection would not be on what is stepped. {ADVICE}"
            )
        if self.boundaries is not None:
            _check_stream(args, kwargs["train_dataloader"])
        if self._stream is not None:  # of a training that was interrupted, as the domain is
            self._stream.close()
            self._stream = None
        if self.domain is not None:
            self.domain.close()
            self.domain = None
        folder, memory, resumes, carried = self._folder(args, state), self.memory, None, None
        if folder is not None:
            resumes, carried = _read(folder), load_carried(folder)
            if isinstance(self.method, MemoryMethod):
                # It began with what the checkpoint has: the method may have learned more since, as may `memory`.
                self.method.memory = None
                memory = folder if carried is not None and carried.memory is not None else None
        self.domain = Domain(
            self.method,
            kwargs["model"],
            kwargs["train_dataloader"],
            kwargs["optimizer"],
            memory=memory,
            records=self.records,
            resumes=resumes,
            ahead=self.boundaries is None,
        )
        self.memory = None  # the method has it now, whatever becomes of this training
        if carried is not None:
            self.domain.domains = carried.domains
        if self.boundaries is not None:
            detector = BoundaryDetector() if isinstance(self.boundaries, str) else self.boundaries
            rewind = Rewind(self.domain.optimizer) if self.rewind else None
            self._stream, self._began = Stream(self.domain.model, detector, self.records, rewind), 0
            if folder is not None:
                kept = torch.load(folder / _STREAM, weights_only=True)
                self._began = kept["began"]
                self._stream.load_state_dict(kept["stream"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stream is not None:
            self._stream.step = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.domain is None or self._stream is None or not self._stream.at_boundary:
            return
        domain, rewind = self.domain, self._stream.rewind
        # Not to before the first step, where nothing is learned yet and an adapter is zero.
        ended = rewind.go_back() if rewind is not None and rewind.step != self._began else state.global_step
        if rewind is not None:
            rewind.drop()
        old, new = self._stream.split()
        domain.look_at(old, self.records)
        domain.end(**self._facts(args, ended))
        self._began = ended
        self.domain = Domain(self.method, domain.model, new, domain.optimizer, records=self.records)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.domain is not None and not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.domain.prove(again=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.domain is None or not logs or "loss" not in logs:
            return
        if drift := self.domain.drift():
            found = {
                "old_output_drift": sum(drift.values()) / len(drift),
                "old_output_drift_most": max(drift.values()),
            }
            logs.update(found)
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.domain is None:
            return
        folder, kept = Path(args.output_dir) / f"checkpoint-{state.global_step}", self.domain.state_dict()
        if not state.is_world_process_zero:
            return
        carried = self.domain.carried()
        if carried.memory is not None and not carried.memory.domains:
            carried.memory = None
        save_carried(folder, carried)
        _write(folder, kept)
        if self._stream is not None:
            torch.save({"began": self._began, "stream": self._stream.state_dict()}, folder / _STREAM)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.domain is None:
            return
        if not state.global_step:
            self.domain.close()
            self.domain = None
            warnings.warn(
                "ContinualCallback: training ended without a step, so nothing was learned, and nothing is remembered",
                stacklevel=2,
            )
            return
        folder = args.output_dir if state.is_world_process_zero else None
        if self._stream is None:
            data: Any = getattr(kwargs.get("train_dataloader"), "dataset", None)
            records = len(data) if hasattr(data, "__len__") else None
            found = {"records": records, "data": getattr(data, "_fingerprint", None)}
        else:
            self._stream.close()
            self.domain.look_at(self._stream.present(), self.records)
            self._stream, found = None, {}
        self.domain.end(folder, **self._facts(args, state.global_step), **found)
        self.domain = None

    def _facts(self, args: Any, ended: int) -> dict[str, Any]:
        """What the history is to know of the domain that ended after so many steps."""
        name = self.name or Path(args.output_dir).name
        if self.boundaries is not None and self.domain is not None:
            name = f"{name}-{len(self.domain.domains) + 1}"
        return {"name": name, "lr": args.learning_rate, "steps": ended - self._began}

    def _folder(self, args: Any, state: Any) -> Path | None:
        """The checkpoint that training goes on from; None: it begins."""
        if not state.global_step:
            return None
        given = self.checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not (Path(given) / STATE).is_file():
            raise RuntimeError(
                f"{given}: training goes on at step {state.global_step}, but there is no {STATE}, which "
                "ContinualCallback writes: where the domain began is unknown. Give the folder that training resumes "
                "from as checkpoint=, an earlier one, or begin the domain anew"
            )
        return Path(given)


def _check_stream(args: Any, loader: Any) -> None:
    if args.world_size > 1:
        raise RuntimeError(
            f"boundaries: expected one process, got {args.world_size}, which see different batches; train one domain "
            "after the other, without boundaries"
        )
    if args.load_best_model_at_end:
        raise RuntimeError(
            "boundaries: load_best_model_at_end would bring back weights of an earlier domain, beside a memory of all; "
            "leave it out"
        )
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None) or getattr(loader, "sampler", None)
    if isinstance(sampler, torch.utils.data.RandomSampler | LengthGroupedSampler):
        raise RuntimeError(
            "boundaries: the trainer shuffles the data, so there are none to find; give "
            'TrainingArguments(train_sampling_strategy="sequential"), or an IterableDataset'
        )


def _write(folder: Path, state: dict[str, Any]) -> None:
    tensors, paths = {}, {}
    for name, kept in state.get("parameters", {}).items():
        for key, value in kept.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}:{key}"] = value
            else:
                paths[name] = value
    tensors |= {f":{device}": generator for device, generator in state.get("generators", {}).items()}
    facts = {"steps": state.get("steps", 0), "paths": paths}
    storage.write(folder / STATE, "protection", tensors, **facts)


def _read(folder: Path) -> dict[str, Any]:
    tensors, facts = storage.read(folder / STATE, "protection", "ContinualCallback", "steps", "paths")
    parameters: dict[str, dict[str, Any]] = {name: {"path": path} for name, path in facts["paths"].items()}
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(":")
        if owner:
            parameters.setdefault(owner, {})[key] = tensor
    generators = {name[1:]: tensor for name, tensor in tensors.items() if name.startswith(":")}
    return {"parameters": parameters, "steps": facts["steps"], "generators": generators}
