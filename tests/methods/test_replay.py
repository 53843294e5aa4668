"""Replay, and the bound that learns everything at once: which examples they train on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from benchmarks.arena import Joint
from sparse_cl.four_domains.training import train
from sparse_cl.methods import Replay1, Replay5
from sparse_cl.methods.replay import _trained_order


class Numbered(Dataset):
    """Items that say where they are from."""

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.name, index


def items(dataset):
    return [dataset[i] for i in range(len(dataset))]


sizes = st.lists(st.integers(1, 300), min_size=2, max_size=5)


@given(sizes=sizes, share=st.floats(0.001, 0.999), seed=st.integers(0, 100))
def test_an_epoch_has_its_share_of_old_examples_evenly_over_domains(sizes, share, seed):
    datasets = [Numbered(name, size) for name, size in enumerate(sizes)]
    number = len(sizes) - 1
    found = items(Replay5(share).training_data(number, datasets, seed))
    assert len(found) == sizes[-1]
    old = [item for item in found if item[0] != number]
    assert len(old) == max(1, round(share * sizes[-1]))
    counts = Counter(name for name, _ in old)
    counted = [counts[name] for name in range(number)]
    assert max(counted) - min(counted) <= 1
    for name, size in enumerate(sizes[:-1]):
        times = Counter(index for other, index in old if other == name)
        assert max(times.values(), default=0) <= -(-counts[name] // size), "none again before all came"
    assert all(item == (number, place) for place, item in enumerate(found) if item[0] == number)


@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_ends_early_has_its_share_too(seed):
    datasets = [Numbered(name, size) for name, size in enumerate((198, 6959, 2982, 4222))]
    for number in (1, 2, 3):
        mixed = Replay5().training_data(number, datasets, seed)
        seen = [mixed[place][0] for place in _trained_order(len(mixed), seed)[:120]]
        assert 5 <= sum(name != number for name in seen) <= 7
        counts = [seen.count(name) for name in range(number)]
        assert max(counts) - min(counts) <= 1


def test_the_trainer_s_order_is_what_it_is_taken_for(tiny_llama, tmp_path):
    class Told(Dataset):
        asked: list[int] = []

        def __len__(self):
            return 97

        def __getitem__(self, index):
            self.asked.append(index)
            return {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [1, 2, 3]}

    train(
        tiny_llama,
        Told(),
        lambda items: {key: torch.tensor([item[key] for item in items]) for key in items[0]},
        lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
        folder=tmp_path,
        steps=8,
        batch_size=4,
        lr=0.0,
        seed=3,
        bar=tqdm(disable=True),
    )
    assert Told.asked[:32] == _trained_order(97, 3)[:32]


def test_the_first_domain_has_none():
    datasets = [Numbered(0, 40), Numbered(1, 50)]
    assert items(Replay5().training_data(0, datasets, 0)) == items(datasets[0])


def test_the_seed_and_the_domain_decide_which():
    datasets = [Numbered(name, 400) for name in range(3)]
    draws = {
        (seed, number): items(Replay5().training_data(number, datasets, seed)) for seed in (0, 1) for number in (1, 2)
    }
    assert draws[0, 2] == items(Replay5().training_data(2, datasets, 0))
    assert draws[0, 2] != draws[1, 2]
    places = {key: [place for place, item in enumerate(draw) if item[0] != key[1]] for key, draw in draws.items()}
    assert len({tuple(where) for where in places.values()}) == 4


@pytest.mark.parametrize(("method", "count"), [(Replay1, 10), (Replay5, 50)])
def test_their_shares_are_those_of_their_names(method, count):
    datasets = [Numbered(name, 1000) for name in range(2)]
    assert sum(name == 0 for name, _ in items(method().training_data(1, datasets, 0))) == count


@given(sizes=sizes)
def test_together_each_domain_comes_as_often_and_none_of_its_examples_is_left_out(sizes):
    datasets = [Numbered(name, size) for name, size in enumerate(sizes)]
    found = Counter(items(Joint().training_data(0, datasets, 0)))
    assert set(found) == {item for dataset in datasets for item in items(dataset)}
    for name, size in enumerate(sizes):
        times = [found[name, index] for index in range(size)]
        assert sum(times) == max(sizes)
        assert max(times) - min(times) <= 1


def test_together_takes_all_steps_at_once():
    assert [Joint().steps(150, number, 4) for number in range(4)] == [600, 0, 0, 0]
