"""A loop of one's own, and how training's records are looked at."""

from __future__ import annotations

import random
import warnings

import accelerate
import pytest
import torch
from cases.methods import copy_of, domain, logits, same, weights
from cases.trainers import records
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, SubsetRandomSampler

from sparse_cl import (
    ColumnMask,
    ElasticAdamW,
    ElementMask,
    RowMask,
    SparseMaskedAdamW,
    SubspaceProjectedAdamW,
    TwoFourMask,
)
from sparse_cl.integrations import Domain, continual
from sparse_cl.integrations.looking import Looking, as_batch
from sparse_cl.methods import Curvature, Elastic, LoRA, Orthogonal, OrthogonalMasked, SelectiveWrite, save_carried
from sparse_cl.optim.active_gradients import active_gradients


def loop(method, model, seed, steps=10, optimizer=None, **options):
    """One domain by SGD or AdamW, as a user would write it."""
    torch.manual_seed(seed)
    loader = domain(seed)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    with continual(method, model, loader, optimizer, **options) as learned:
        for step in range(steps):
            model(**loader[step % len(loader)]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return learned


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_the_second_domain_moves_old_outputs_less(tiny_llama, wrap):
    moved = []
    for strength in (5.0, 0.0):
        model, method = copy_of(tiny_llama), Elastic(strength=strength)
        loop(method, wrap(model) if strength else model, 0)
        before = logits(model, domain(0))
        learned = loop(method, model, 1)
        assert len(learned.carried().domains) == learned.carried().memory.domains == 2
        moved.append(float((logits(model, domain(0)) - before).norm()))
    assert moved[0] < 0.7 * moved[1]


def test_a_model_without_what_the_memory_was_written_beside_is_named(tiny_llama, tmp_path):
    """The base model in place of the one that learned; saved in another dtype it is the same one."""
    learning = copy_of(tiny_llama)
    save_carried(tmp_path, loop(Elastic(), learning, 0).carried())
    with pytest.warns(UserWarning, match="was written beside other weights"):
        loop(Elastic(), tiny_llama, 1, steps=1, memory=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other weights")
        rounded = copy_of(learning).bfloat16().float()
        for model in (rounded, learning):
            loop(Elastic(), model, 1, steps=1, memory=tmp_path)


def test_a_loop_of_accelerates_is_protected(tiny_llama):
    """Its wrappers of model, optimizer and loader are looked through."""
    moved = []
    for strength in (5.0, 0.0):
        model, method = copy_of(tiny_llama), Elastic(strength=strength)
        for seed in range(2):
            before = logits(model, domain(0))
            accelerator = accelerate.Accelerator(cpu=True)
            loader = DataLoader(records(seed, count=40), batch_size=4, shuffle=False, collate_fn=collate)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            with continual(method, wrapped, loader, optimizer):
                for batch in loader:
                    accelerator.backward(wrapped(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
        moved.append(float((logits(model, domain(0)) - before).norm()))
    assert moved[0] < 0.7 * moved[1]


def test_what_ends_in_an_error_is_not_remembered_and_not_protected(tiny_llama):
    method, optimizer = Elastic(), torch.optim.SGD(tiny_llama.parameters(), lr=0.1)
    loop(method, tiny_llama, 0)
    with pytest.raises(ZeroDivisionError), continual(method, tiny_llama, domain(1), optimizer):
        raise ZeroDivisionError
    assert method.memory.domains == 1
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks
    loop(method, tiny_llama, 1)
    assert method.memory.domains == 2


def test_a_domain_without_a_step_is_an_error(tiny_llama):
    with pytest.raises(RuntimeError, match="the optimizer took no step in the domain"):
        loop(Elastic(), tiny_llama, 0, steps=0)


def test_other_parameters_and_other_methods_are_refused(tiny_llama):
    other = torch.optim.AdamW(copy_of(tiny_llama).parameters())
    with pytest.raises(RuntimeError, match="steps other tensors than the model's: one of shape"):
        loop(Elastic(), tiny_llama, 0, optimizer=other)
    with pytest.raises(ValueError, match="lora wraps the model"):
        loop(LoRA(), tiny_llama, 0)
    with pytest.raises(TypeError, match="optimizer: expected a torch.optim.Optimizer, got int"):
        loop(Elastic(), tiny_llama, 0, optimizer=3)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def test_what_an_optimizer_of_ours_protects_is_not_dropped(tiny_llama):
    method = Elastic()
    loop(method, tiny_llama, 0)
    optimizer = ElasticAdamW(tiny_llama.named_parameters(), memory=method.memory, budget=1e-4)
    with pytest.raises(ValueError, match="ElasticAdamW protects something already, .* method.remember"):
        Domain(Elastic(), tiny_llama, domain(1), optimizer)
    assert optimizer.memory is method.memory
    with pytest.warns(UserWarning, match=r"its own rule \(a budget of 0.0001, rows .*, not the method's \(20, rows"):
        Domain(method, tiny_llama, domain(1), optimizer).close()


def test_a_hard_method_wants_an_optimizer_that_keeps_out(tiny_llama):
    with pytest.raises(ValueError, match=r"lets old outputs move \(a pull of 20\), .* take SubspaceProjectedAdamW"):
        Domain(Orthogonal(), tiny_llama, domain(0), ElasticAdamW(tiny_llama.named_parameters()))
    for optimizer in (SubspaceProjectedAdamW, lambda p: ElasticAdamW(p, budget=0)):
        Domain(Orthogonal(), tiny_llama, domain(0), optimizer(tiny_llama.named_parameters())).close()


def test_what_a_hard_method_cannot_freeze_behind_an_optimizer_is_named(tiny_llama):
    method = Orthogonal()
    loop(method, tiny_llama, 0)
    with pytest.warns(UserWarning, match="behind this AdamW 5 norms and biases are trained unprotected"):
        loop(method, tiny_llama, 1, steps=1)


@pytest.mark.parametrize("method", [SelectiveWrite, OrthogonalMasked, Curvature])
def test_a_method_with_an_optimizer_of_its_own_refuses_ours_too(tiny_llama, method):
    for optimizer in (ElasticAdamW, SubspaceProjectedAdamW, torch.optim.AdamW):
        with pytest.raises(ValueError, match="needs an optimizer of its own, .* take elastic or orthogonal"):
            Domain(method(), tiny_llama, domain(0), optimizer(tiny_llama.named_parameters()))


def test_a_subclass_with_an_optimizer_of_its_own_refuses_others(tiny_llama):
    class Own(Orthogonal):
        def make_optimizer(self, model, lr):
            return SubspaceProjectedAdamW(model.named_parameters(), lr=lr, memory=self.memory)

    with pytest.raises(ValueError, match="needs an optimizer of its own"):
        Domain(Own(), tiny_llama, domain(0), torch.optim.AdamW(tiny_llama.parameters()))


def test_another_optimizer_beside_or_after_the_protected_one_is_noticed(tiny_llama):
    method = Elastic()
    loop(method, tiny_llama, 0)
    halves = [[p for n, p in tiny_llama.named_parameters() if ("mlp" in n) is mlp] for mlp in (True, False)]
    one, two = (torch.optim.AdamW(half, lr=1e-2) for half in halves)
    with (
        pytest.warns(UserWarning, match=r"weights that it knows have gradients and are not in this optimizer"),
        continual(method, tiny_llama, domain(1), one),
    ):
        tiny_llama(**domain(1)[0]).loss.backward()
        one.step()
        two.step()
    tiny_llama.zero_grad()
    with (
        pytest.warns(UserWarning, match="was written after the last step of the optimizer that was given"),
        continual(method, tiny_llama, domain(2), optimizer := adamw(tiny_llama)),
    ):
        for _ in range(2):
            tiny_llama(**domain(2)[0]).loss.backward()
            optimizer.step()
            optimizer = adamw(tiny_llama)


def test_a_domain_that_is_resumed_without_its_memory_is_refused(tiny_llama):
    method = Elastic()
    loop(method, tiny_llama, 0)
    first = Domain(method, tiny_llama, domain(1), adamw(tiny_llama))
    state = first.state_dict()
    first.close()
    with pytest.raises(ValueError, match="memory: expected the one that the domain began with, got none"):
        Domain(Elastic(), tiny_llama, domain(1), adamw(tiny_llama), resumes=state)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(records(0, count=50))


def collate(items):
    random.random(), torch.rand(1)
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


@pytest.mark.parametrize("stream", [False, True])
def test_records_are_looked_at_without_disturbing_the_loader(tiny_llama, stream):
    data = records(0, count=50)
    loader = DataLoader(Stream() if stream else data, batch_size=4, shuffle=not stream, collate_fn=collate)
    looking, states = Looking(loader, tiny_llama, 10), (random.getstate(), torch.get_rng_state())
    for _ in range(2):
        seen = [row.tolist() for batch in looking for row in batch["input_ids"]]
        expected = range(10) if stream else range(0, 50, 5)
        assert seen == [data[i]["input_ids"] for i in expected]
    assert states[0] == random.getstate() and torch.equal(states[1], torch.get_rng_state())


def test_of_a_list_of_batches_some_are_looked_at_all_along_it(tiny_llama):
    batches = [collate(records(0, count=80)[i : i + 4]) for i in range(0, 80, 4)]
    seen = list(Looking(batches, tiny_llama, 10))
    assert [batch["input_ids"].tolist() for batch in seen] == [batches[i]["input_ids"].tolist() for i in (0, 6, 13)]


def test_of_a_subset_only_its_records_are_looked_at(tiny_llama):
    data = records(0, count=50)
    loader = DataLoader(data, batch_size=4, sampler=SubsetRandomSampler(range(20, 40)), collate_fn=collate)
    seen = [row.tolist() for batch in Looking(loader, tiny_llama, 10) for row in batch["input_ids"]]
    assert seen == [data[i]["input_ids"] for i in range(20, 40, 2)]


@pytest.mark.parametrize("mapped", [False, True])
def test_items_that_are_batches_already(tiny_llama, mapped):
    data = records(0, count=50)

    class Batches(IterableDataset):
        def __iter__(self):
            return (collate(data[i : i + 4]) for i in range(0, 48, 4))

    class Indexed:
        def __len__(self):
            return len(data)

        def __getitem__(self, places):
            return collate([data[i] for i in places])

    if mapped:
        loader = DataLoader(Indexed(), sampler=BatchSampler(SequentialSampler(data), 4, True), batch_size=None)
    else:
        loader = DataLoader(Batches(), batch_size=None)
    seen = [row.tolist() for batch in Looking(loader, tiny_llama, 10) for row in batch["input_ids"]]
    assert seen == [record["input_ids"] for record in data[:12]]


class Once(IterableDataset):
    def __init__(self):
        self.rows = iter(records(0, count=50))

    def __iter__(self):
        return self.rows


@pytest.mark.parametrize("make", [lambda: iter(domain(0)), lambda: DataLoader(Once(), 4, collate_fn=collate)])
def test_data_that_come_once_only_are_refused_and_stay_whole(tiny_llama, make):
    loader = make()
    with pytest.raises(ValueError, match="loader: its data can be iterated over once only"):
        Domain(Elastic(), tiny_llama, loader, adamw(tiny_llama))
    assert len(list(loader)) == (len(domain(0)) if not isinstance(loader, DataLoader) else 13)


def test_what_makes_no_batches_is_refused_before_training(tiny_llama):
    loader = DataLoader([{"pixel_values": torch.zeros(3)}], 1)
    with pytest.raises(ValueError, match="loader: expected batches with input_ids"):
        Domain(Elastic(), tiny_llama, loader, adamw(tiny_llama))


def test_packed_records_are_remembered_apart(tiny_llama):
    """By their positions, as a collator that flattens leaves them."""
    rows, found = [record["input_ids"] for record in records(0, count=3)], []
    flat = {"input_ids": torch.tensor([sum(rows, [])]), "position_ids": torch.arange(8).repeat(3)[None]}
    flat["labels"] = flat["input_ids"]
    apart = {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}
    for loader in ([flat], [apart]):
        method, model = Elastic(), copy_of(tiny_llama)
        model.config.use_cache = False  # as the Trainer sets it; with a cache transformers does not look at positions
        with continual(method, model, loader, torch.optim.SGD(model.parameters(), lr=0.0)) as learned:
            learned.optimizer.step()
        found.append(method.memory)
    for name in found[0].names:
        ours, expected = (memory.subspace(name) for memory in found)
        products = [(x.basis * x.values) @ x.basis.mT for x in (ours, expected)]
        torch.testing.assert_close(*products, rtol=1e-3, atol=1e-4 * float(products[1].abs().max()))


def test_batches_of_trainers():
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = as_batch({"input_ids": ids, "attention_mask": mask, "completion_mask": mask - mask * (mask.cumsum(1) < 2)})
    assert found["labels"].tolist() == [[-100, 1, -100], [-100, 1, 1]]
    assert as_batch({"input_ids": ids})["labels"] is ids
    with pytest.raises(ValueError, match=r"loader: expected batches with input_ids, got \['pixel_values'\]"):
        as_batch({"pixel_values": ids})


def dense(rows):
    return torch.zeros(6, 4, dtype=torch.bool).index_fill(0, torch.tensor(rows), True)


@pytest.mark.parametrize(
    "mask",
    [
        lambda rows: RowMask(rows, (6, 4)),
        lambda rows: ColumnMask(rows, (6, 4)),
        lambda rows: ElementMask(dense(rows)),
        lambda rows: TwoFourMask(dense(rows)[:, :2].repeat_interleave(2, 1) ^ torch.tensor([True, False, False, True])),
    ],
    ids=["rows", "columns", "elements", "2:4"],
)
def test_gradients_follow_the_masks(mask):
    weight = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = SparseMaskedAdamW([("w", weight)], masks={"w": mask([1])})
    clipping = active_gradients(optimizer)
    for rows in ([1], [2, 3], [1]):
        optimizer.set_masks({"w": mask(rows)})
        for _ in range(2):
            weight.grad = None
            weight.sum().backward()
            assert torch.equal(weight.grad, mask(rows).to_dense().float())
    clipping.close()
    weight.sum().backward()
    assert bool(weight.grad.all())


def test_a_first_domain_is_trained_as_without(tiny_llama):
    free = copy_of(tiny_llama)
    optimizer = torch.optim.AdamW(free.parameters(), lr=1e-2)
    for step in range(10):
        free(**domain(0)[step % 5]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    loop(Elastic(), tiny_llama, 0)
    assert same(weights(free), weights(tiny_llama))
