"""The parts of the reference that everything else is measured against."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.layout import BLOCK, COLUMNS, DENSE, ELEMENTS, ROWS, TWO_FOUR, StateLayout
from sparse_cl.reference import active_positions, block_ranks, pack_bits, random_bits, stochastic_round, unpack_bits

NARROW = (torch.bfloat16, torch.float16)


@given(st.integers(0, 5000), st.sampled_from((0.0, 0.01, 0.5, 1.0)), st.integers(0, 9))
def test_bits_and_ranks_against_brute_force(numel, density, seed):
    dense = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < density
    words, flags = pack_bits(dense), dense.tolist()
    assert words.dtype == torch.int32
    assert len(words) == -(-numel // 32)
    for i, word in enumerate(words.tolist()):
        chunk = flags[32 * i : 32 * i + 32]
        assert word & 0xFFFFFFFF == sum(flag << bit for bit, flag in enumerate(chunk))
    assert torch.equal(unpack_bits(words, numel), dense)
    starts = range(0, numel, BLOCK)
    assert block_ranks(dense).tolist() == [sum(flags[:start]) for start in starts] + [sum(flags)]


@pytest.mark.parametrize("kind", [DENSE, ROWS, COLUMNS, ELEMENTS, TWO_FOUR])
def test_positions_ascend_and_match_the_dense_mask(kind):
    dense = torch.zeros(6, 8, dtype=torch.bool)
    index = {ROWS: [1, 4], COLUMNS: [0, 5, 7]}.get(kind)
    views = {}
    if kind == ROWS:
        dense[index], views = True, {"rows": torch.tensor(index, dtype=torch.int32)}
    elif kind == COLUMNS:
        dense[:, index], views = True, {"columns": torch.tensor(index, dtype=torch.int32)}
    elif kind == DENSE:
        dense[:] = True
    else:
        dense[:, ::2] = True
        views = {"bits" if kind == ELEMENTS else "two_four_bits": pack_bits(dense)}
    units = len(index) if index else int(dense.sum())
    layout = StateLayout(kind, (6, 8), units, torch.float32)
    positions = active_positions(layout, views, torch.device("cpu"))
    assert torch.equal(positions, dense.view(-1).nonzero().view(-1))
    assert positions.numel() == layout.entries


def neighbours(x, dtype):
    """The largest value of ``dtype`` that is at most x, and the smallest that is at least x, in float64."""
    nearest = torch.tensor(x, dtype=torch.float64).to(dtype)
    step = torch.nextafter(nearest, torch.tensor(math.inf if nearest.double() < x else -math.inf).to(dtype))
    pair = sorted((nearest.double().item(), step.double().item()))
    return (x, x) if nearest.double() == x else tuple(pair)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "magnitude", [1.0 + 1e-3, 3.14159, 1e-3, 777.77, 2.0**-14 * 1.0003, 2.0**-15 * 1.3, 2.0**-20 * 1.77, 2.0**-24 * 0.3]
)
def test_stochastic_rounding_is_unbiased_between_the_two_neighbours(dtype, sign, magnitude):
    draws = 1 << 17
    x = torch.full((draws,), sign * magnitude)
    bits = torch.randint(1 << 32, (draws,), generator=torch.Generator().manual_seed(0))
    rounded = stochastic_round(x, bits, dtype).double()
    exact = x[0].double().item()
    low, high = neighbours(exact, dtype)
    assert low < exact < high
    assert set(rounded.unique().tolist()) == {low, high}
    chance = (exact - low) / (high - low)
    # Five standard deviations; float16 draws 13 bits.
    allowed = 5 * math.sqrt(chance * (1 - chance) / draws) + 2.0**-13
    assert abs((rounded == high).double().mean().item() - chance) <= allowed


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bits", [0, 1, 0x1FFF, 0xFFFF, 0xFFFFFFFF])
def test_values_that_the_dtype_holds_stay(dtype, bits):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    rounded = stochastic_round(every.float(), torch.tensor(bits), dtype)
    assert torch.equal(rounded.view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("dtype", NARROW)
def test_values_out_of_range_round_as_usual(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([math.inf, -math.inf, math.nan, largest * 1.001, -largest * 1.001])
    for bits in (0, 0xFFFFFFFF):
        rounded = stochastic_round(x, torch.tensor(bits), dtype)
        assert torch.equal(rounded[:2], x[:2].to(dtype))
        assert rounded[2].isnan()
        assert torch.equal(rounded[3:], x[3:].to(dtype))


@given(st.floats(-6e4, 6e4, width=32), st.integers(0, 2**32 - 1), st.sampled_from(NARROW))
def test_stochastic_rounding_never_leaves_the_two_neighbours(x, bits, dtype):
    rounded = stochastic_round(torch.tensor([x]), torch.tensor([bits]), dtype).double().item()
    assert rounded in neighbours(x, dtype)


def test_random_bits_are_uniform_and_differ_by_seed_step_and_entry():
    entry = torch.arange(1 << 16)
    streams = [random_bits(seed, torch.tensor(step), entry) for seed in (0, 1) for step in (1, 2)]
    for stream in streams:
        assert ((stream >= 0) & (stream < 1 << 32)).all()
        for bit in range(32):
            ones = ((stream >> bit) & 1).double().mean().item()
            assert abs(ones - 0.5) < 5 * 0.5 / 256
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert (a == b).sum() < 5
            agreeing = (((a ^ b) >> 7) & 1 == 0).double().mean().item()
            assert abs(agreeing - 0.5) < 5 * 0.5 / 256
    assert (random_bits(0, torch.tensor(1), entry + (1 << 32)) == streams[0]).sum() < 5
