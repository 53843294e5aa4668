"""Small domains, and a method's life on them as the sequence of domains leads it."""

from __future__ import annotations

import contextlib
import itertools

import torch
import transformers

from sparse_cl.methods import METHODS

CLIP = 1.0
SHIPPED = [name for name, method in METHODS.items() if method.__module__.startswith("sparse_cl.")]
"""Methods of the package, without those that the arena adds to compare with; these have tests of their own."""


def domain(seed, count=5):
    """Batches of two sequences over a seventh of the vocabulary; the second is padded at its end."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    batches = []
    for _ in range(count):
        ids = torch.randint(40 * seed, 40 * seed + 40, (2, 8), generator=generator) * mask
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


def learn(method, model, batches, lr=1e-2, steps=6, folder=None, each_step=lambda model: None):
    """One domain, seeded, clipped and saved as a run does; returns the model.

    `each_step` is called with the model after each step of the optimizer.
    """
    transformers.set_seed(0)
    model = method.before_domain(model, batches)
    optimizer = method.make_optimizer(model, lr)
    model.train()
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        penalty = method.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        if hasattr(optimizer, "clip_grad_norm_"):
            optimizer.clip_grad_norm_(CLIP)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        each_step(model)
    method.after_domain(model, batches)
    if folder is not None:
        model.save_pretrained(folder)
        method.save(folder)
    return model


def copy_of(model):
    """An equal model of its own."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    return other


def weights(model):
    """A copy of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def logits(model, batches):
    """What the model computes on batches, in evaluation mode."""
    was_training = model.training
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, was_training)
        model.eval()
        return torch.stack(
            [model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in batches]
        )


def gradients_of(model, batches):
    """Of all parameters by name, (2 batches, …): the gradient of the model's own loss on each sequence of `domain`."""
    found = []
    for batch, row in itertools.product(batches, range(2)):
        other = copy_of(model)
        other(**{name: part[row : row + 1] for name, part in batch.items()}).loss.backward()
        found.append({name: p.grad for name, p in other.named_parameters()})
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


def inputs_of(model, layer, batches):
    """What enters a layer (its name may have a prefix) for all tokens that are not padding, (tokens, n)."""
    seen = []
    (module,) = (m for n, m in model.named_modules() if n.endswith(layer))
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    logits(model, batches)
    handle.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, batches, strict=True)])
