"""Whether a model can still learn after many domains, and what keeps it able to.

    python -m benchmarks.arena.sources --data DIR --out SOURCES
    python -m benchmarks.arena.plasticity --model MODEL --data SOURCES --json FILE [--steps 15] [--only NAME;…]

Sixteen domains one after another by each way of `WAYS`; what was stopped goes on with the same command, way by way.
Measured are

- steps to fit new random tasks (`steps_to_fit`) before any domain and after 4, 8 and 16;
- bits per byte of each domain's held-out records before and after it was learned, and after all; and beside the last
  two domains those of the same way that learns each of them alone, from the model as it was before all;
- how much of the third domain's update and activation lands on neurons that the first two use least (`probes.waking`).
  The update is that of training: what was drawn anew before it counts as before.

Nothing here is tuned but the rates, which are those of the four domains.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from sparse_cl.data import EncodedRecords
from sparse_cl.four_domains.domains import Domain, load_domains
from sparse_cl.four_domains.evaluate import bits_per_byte
from sparse_cl.four_domains.files import write_json
from sparse_cl.four_domains.sequence import DomainBatches
from sparse_cl.four_domains.training import warmup_of
from sparse_cl.methods import AdamW, Elastic, Method, SelectiveWrite
from sparse_cl.methods.base import Batch
from sparse_cl.methods.waking import Waking
from sparse_cl.models.loading import load_model
from sparse_cl.probes import ActivationProbe, steps_to_fit, waking
from sparse_cl.probes.plasticity import RandomSequences

from .sources import SOURCES

LENGTH, SIZE, SCORED, STAGES, WAKES, ALONE = 128, 4, 32, (4, 8, 16), 3, 2


class L2Init(AdamW):
    """AdamW whose weights decay towards where they began (Kumar, Marklund & Van Roy 2023), apart from the gradient."""

    def __init__(self, decay: float = 30.0) -> None:
        super().__init__()
        self.decay, self.start = decay, None

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self.start = self.start or [p.detach().clone() for p in model.parameters()]
        return super().before_domain(model, batches)

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        optimizer, start = super().make_optimizer(model, lr), self.start

        @torch.no_grad()
        def decay(optimizer: Any, *_: Any) -> None:
            share = optimizer.param_groups[0]["lr"] * self.decay
            for p, origin in zip(model.parameters(), start, strict=True):
                p.lerp_(origin, share)

        optimizer.register_step_post_hook(decay)
        return optimizer


class SpectralReset(AdamW):
    """AdamW; after each domain every matrix has the singular values again that it began with."""

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        if not hasattr(self, "values"):
            matrices = ((n, p.detach().double()) for n, p in model.named_parameters() if p.dim() == 2)
            self.values = {name: torch.linalg.svdvals(p) for name, p in matrices}
        return super().before_domain(model, batches)

    @torch.no_grad()
    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        for name, values in self.values.items():
            p = model.get_parameter(name)
            u, _, v = torch.linalg.svd(p.double(), full_matrices=False)
            p.copy_((u * values) @ v)


class Recycled(AdamW):
    """AdamW; a tenth of the neurons, those least used, are drawn anew before each domain."""

    def __init__(self) -> None:
        super().__init__()
        self.waking = Waking(0.1)

    def before_domain(self, model: nn.Module, batches: Iterable[Batch]) -> nn.Module:
        self.waking.renew(model, self.waking.choose(model))
        return super().before_domain(model, batches)

    def after_domain(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self.waking.observe(model, batches)


WAYS: dict[str, tuple[Callable[[], Method], float]] = {
    "AdamW": (AdamW, 3e-4),
    "elastic": (lambda: Elastic(strength=50.0), 1e-3),
    "selective-write": (SelectiveWrite, 1e-3),
    "selective-write, waking": (lambda: SelectiveWrite(wake=0.1), 1e-3),
    "AdamW, neurons recycled": (Recycled, 3e-4),
    "AdamW, L2 to init": (L2Init, 3e-4),
    "AdamW, spectral reset": (SpectralReset, 3e-4),
    "AdamW, lower rate": (AdamW, 1e-4),
}
"""Name → a fresh method, and its peak rate."""


class Learner:
    """What learning one domain needs besides a model and a method."""

    def __init__(self, tokenizer: Any, steps: int, seed: int) -> None:
        self.tokenizer, self.steps, self.seed = tokenizer, steps, seed

    def batches(self, domain: Domain) -> DomainBatches:
        """Of training records, for methods and probes."""
        return DomainBatches(EncodedRecords(domain.train, self.tokenizer, LENGTH), 8, torch.device("cpu"), 64)

    def learn(
        self,
        model: nn.Module,
        method: Method,
        lr: float,
        domain: Domain,
        begun: Callable[[nn.Module], object] = lambda model: None,
    ) -> nn.Module:
        transformers.set_seed(self.seed)
        batches = self.batches(domain)
        encoded = batches.encoded
        model = method.before_domain(model, batches)
        begun(model)
        optimizer = method.make_optimizer(model, lr)
        warm = warmup_of(self.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(step / warm, (self.steps - step) / (self.steps - warm))
        )
        collator = transformers.DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=-100)
        draw = random.Random(self.seed)
        order = [
            i
            for _ in range(self.steps * SIZE // len(encoded) + 1)
            for i in draw.sample(range(len(encoded)), len(encoded))
        ]
        model.train()
        for step in range(self.steps):
            batch = collator([encoded[i] for i in order[step * SIZE : (step + 1) * SIZE]])
            model(**batch).loss.backward()
            clip = getattr(optimizer, "clip_grad_norm_", None)
            clip(1.0) if clip else nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        method.after_domain(model, batches)
        return model

    def score(self, model: nn.Module, domain: Domain) -> float:
        return bits_per_byte(model, self.tokenizer, domain.test[:SCORED], LENGTH)


def fit(model: Any) -> dict[str, Any]:
    found = steps_to_fit(model, task=RandomSequences(model.config.vocab_size, sequences=16))
    return {"median": found.median_steps, "range": list(found.range_steps), "loss": round(found.median_loss, 4)}


def sequence(base: nn.Module, learner: Learner, domains: Sequence[Domain], name: str) -> dict[str, Any]:
    """All domains by one way, and the last few of them alone."""
    make, lr = WAYS[name]
    model, method = copy.deepcopy(base), make()
    fits: dict[str, Any] = {}
    learned: list[dict[str, Any]] = []
    woken: dict[str, Any] = {}
    for number, domain in enumerate(domains, 1):
        before = learner.score(model, domain)
        if number == WAKES:
            model, woken = wakes(model, method, lr, learner, domains[:number])
        else:
            model = learner.learn(model, method, lr, domain)
        learned.append({"domain": domain.name, "before": before, "after": learner.score(model, domain)})
        if number in STAGES:
            fits[str(number)] = fit(model)
    for entry, domain in zip(learned, domains, strict=True):
        entry["last"] = learner.score(model, domain)
    for entry, domain in list(zip(learned, domains, strict=True))[-ALONE:]:
        entry["alone"] = learner.score(learner.learn(copy.deepcopy(base), make(), lr, domain), domain)
    settings = {"name": name, "lr": lr, "steps": learner.steps, "seed": learner.seed}
    return {**settings, "fits": fits, "learned": learned, "woken": woken}


def wakes(
    model: nn.Module, method: Method, lr: float, learner: Learner, domains: Sequence[Domain]
) -> tuple[nn.Module, dict[str, Any]]:
    """Learn the last of some domains; and what that wakes."""
    earlier = {one.name: ActivationProbe(model, tokens="all").run(learner.batches(one)) for one in domains[:-1]}
    start: dict[str, torch.Tensor] = {}

    def begun(model: nn.Module) -> None:
        start.update((n, p.detach().clone()) for n, p in model.named_parameters())

    model = learner.learn(model, method, lr, domains[-1], begun)
    learned = ActivationProbe(model, tokens="all").run(learner.batches(domains[-1]))
    after = {name: p.detach() for name, p in model.named_parameters()}
    return model, waking(start, after, earlier, learned).to_json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder that benchmarks.arena.sources wrote")
    parser.add_argument("--json", type=Path, required=True, help="results; those that are there are gone on from")
    parser.add_argument("--steps", type=int, default=15, help="of a domain (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="ways, with semicolons between them (default: all)")
    given = parser.parse_args()
    results = json.loads(given.json.read_text(encoding="utf-8")) if given.json.exists() else {"runs": []}
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base, tokenizer = load_model(given.model)
    domains = load_domains(SOURCES, given.data, 0)
    learner = Learner(tokenizer, given.steps, given.seed)
    results["before"] = results.get("before") or fit(base)
    for name in given.only.split(";") if given.only else WAYS:
        key = {"name": name, "steps": given.steps, "seed": given.seed}
        if not any(key.items() <= run.items() for run in results["runs"]):
            results["runs"].append(sequence(base, learner, domains, name))
            write_json(given.json, results)
            print(json.dumps(results["runs"][-1]), flush=True)


if __name__ == "__main__":
    main()
