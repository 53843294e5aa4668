"""Which records are held out depends on what they say and on the seed, and on nothing else."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparse_cl.data import DataError, Records, hold_out
from sparse_cl.data.records import HELD_OUT, Record


def records(contents):
    made = [Record.at(f"a.jsonl:{n}", prompt=f"p{content}", response="r") for n, content in enumerate(contents, 1)]
    return Records(made, "prompt/response", "a.jsonl")


contents = st.lists(st.integers(0, 60), min_size=2, max_size=120)
seeds = st.integers(0, 5)


@given(contents=contents, seed=seeds, share=st.sampled_from([0.05, 0.3, 0.9]), random=st.randoms(use_true_random=False))
def test_a_hash_of_the_content_chooses(contents, seed, share, random):
    assume(len(set(contents)) > 1)
    train, held = hold_out(records(contents), seed, share)
    taught = [{record["prompt"] for record in part} for part in (train, held)]
    assert not taught[0] & taught[1], "no record is on both sides, however often it stands there"
    assert taught[0] and taught[1]
    assert sorted(train.where + held.where) == sorted(records(contents).where)
    assert all(part.where == sorted(part.where, key=lambda where: int(where[8:])) for part in (train, held))
    rarest = min(contents.count(content) for content in contents)
    assert len(held) <= max(int(share * len(contents)), 1, rarest)
    shuffled = list(contents)
    random.shuffle(shuffled)
    again = hold_out(records(shuffled), seed, share)
    assert {record["prompt"] for record in again[1]} == taught[1]


@pytest.mark.parametrize(("count", "expected"), [(2, 1), (19, 1), (40, 2), (1000, 50), (10_000, HELD_OUT)])
def test_how_many_are_held_out(count, expected):
    train, held = hold_out(records(range(count)), 0)
    assert (len(train), len(held)) == (count - expected, expected)


def test_records_that_are_added_move_few_others():
    before = {record["prompt"] for record in hold_out(records(range(1000)), 0)[1]}
    after = {record["prompt"] for record in hold_out(records(range(1020)), 0)[1]}
    assert len(before & after) >= 45


def test_the_seed_chooses_too():
    held = [{record["prompt"] for record in hold_out(records(range(1000)), seed)[1]} for seed in (0, 1)]
    assert len(held[0] & held[1]) < 15


def test_what_was_done_is_said_in_a_sentence():
    train, held = hold_out(records(range(1240)), 7)
    assert held.describe() == (
        "62 records (prompt/response) from a.jsonl, held out of 1,240 by a hash of their content with seed 7"
    )
    assert train.describe().startswith("1,178 records (prompt/response) from a.jsonl, ")
    assert train.fingerprint != held.fingerprint


@pytest.mark.parametrize("contents", [[1], [1, 1, 1]])
def test_nothing_to_hold_out(contents):
    with pytest.raises(DataError, match=r"a\.jsonl: \d training records?, 1 of them different; need at least 2"):
        hold_out(records(contents), 0)


def test_a_share_that_is_none():
    with pytest.raises(ValueError, match="share must be above 0 and below 1, got 1"):
        hold_out(records([1, 2]), 0, 1)
