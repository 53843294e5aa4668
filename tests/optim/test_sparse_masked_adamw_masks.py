"""Changes of masks: every entry keeps its own state and step count, or starts anew; and gains."""

import warnings

import pytest
import torch
from cases.optimizers import DTYPES, open_entries, random_mask, spread
from torch import nn

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW


class Simulated:
    """AdamW on every entry for itself in float64, with a step count of its own; a closed entry forgets."""

    def __init__(self, start, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1):
        self.value = start.double().clone()
        self.m, self.v, self.t = (torch.zeros_like(self.value) for _ in range(3))
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.active = torch.ones(start.shape, dtype=torch.bool)

    def open(self, active, forget=False):
        keep = torch.zeros_like(active) if forget else active
        for state in (self.m, self.v, self.t):
            state.masked_fill_(~keep, 0)
        self.active = active

    def step(self, grad, gain=1.0):
        g, a = grad.double(), self.active
        b1, b2 = self.betas
        self.t[a] += 1
        self.m[a] = b1 * self.m[a] + (1 - b1) * g[a]
        self.v[a] = b2 * self.v[a] + (1 - b2) * g[a] ** 2
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        moved = self.lr * (m_hat / (v_hat.sqrt() + self.eps) + self.weight_decay * self.value) * gain
        self.value = torch.where(a, self.value - moved, self.value)


CHAINS = {
    "across kinds": ("rows", "columns", "elements", "two_four", "dense"),
    "and back": ("dense", "two_four", "elements", "columns", "rows"),
    "rows": ("rows", "rows", "dense", "rows", "rows"),
    "columns": ("columns", "columns", "elements", "columns", "columns"),
    "elements": ("elements", "elements", "elements", "two_four", "two_four"),
}


@pytest.mark.parametrize("carry", ["intersection", "none"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_every_entry_keeps_its_own_count_through_changes_of_masks(implementation, chain, dtype, carry):
    rng, shape = torch.Generator().manual_seed(1), (12, 16)
    param = nn.Parameter(torch.randn(shape, generator=rng).to(dtype))
    oracle = Simulated(param.detach())
    opt = SparseMaskedAdamW([param], lr=1e-2, weight_decay=0.1)
    for kind in chain:
        mask = random_mask(kind, shape, 0.7, rng)
        before = oracle.active
        opt.set_masks({} if mask is None else {param: mask}, carry=carry)
        oracle.open(open_entries(mask, shape), forget=carry == "none")
        if dtype != torch.float32:
            # An entry that closes keeps its rounded value only, and starts from it when it opens again; with
            # carry="none" all do.
            anew = ~oracle.active if carry == "intersection" else torch.ones_like(before)
            oracle.value = torch.where(anew, param.detach().double(), oracle.value)
        for _ in range(4):
            param.grad = torch.randn(shape, generator=rng).to(dtype)
            oracle.step(param.grad)
            opt.step()
        state, active = opt.state[param], oracle.active
        value = param if dtype == torch.float32 else spread(opt, param, "master")
        torch.testing.assert_close(value.double()[active], oracle.value[active], rtol=2e-6, atol=2e-6)
        for name, expected in (("exp_avg", oracle.m), ("exp_avg_sq", oracle.v)):
            torch.testing.assert_close(spread(opt, param, name).double(), expected, rtol=1e-5, atol=1e-7)
        assert set(state["step"].view(-1).tolist()) == set(oracle.t[active].int().tolist())


def test_an_unchanged_mask_keeps_its_state_even_if_nothing_else_is_carried():
    params = {name: nn.Parameter(torch.ones(4, 4)) for name in "ab"}
    opt = SparseMaskedAdamW(list(params.items()), masks={name: RowMask([1, 2], (4, 4)) for name in "ab"})
    for p in params.values():
        p.grad = torch.ones(4, 4)
    opt.step()
    opt.set_masks({"a": RowMask([2, 1], (4, 4)), "b": RowMask([1, 3], (4, 4))}, carry="none")
    opt.step()
    assert opt.state[params["a"]]["step"].item() == 2
    assert opt.state[params["b"]]["step"].item() == 1


@pytest.mark.parametrize("cls, dim", [(RowMask, 0), (ColumnMask, 1)])
def test_a_unit_whose_entries_agree_stores_one_count(implementation, cls, dim):
    param = nn.Parameter(torch.ones(4, 4))
    opt = SparseMaskedAdamW([param], masks={param: cls([0, 1], (4, 4))})

    def steps(count, mask):
        opt.set_masks({param: mask} if mask else {})
        for _ in range(count):
            param.grad = torch.ones(4, 4)
            opt.step()

    steps(2, cls([0, 1], (4, 4)))
    steps(1, None)
    assert opt.state[param]["cohort"].shape == (4, 4)
    steps(1, cls([1, 3], (4, 4)))
    state = opt.state[param]
    assert state["cohort"].shape == (2,)
    assert state["step"][state["cohort"].long()].tolist() == [4, 2]
    # Entries of one unit that differ need a count each.
    steps(1, None)
    steps(1, (RowMask if cls is ColumnMask else ColumnMask)([1, 2], (4, 4)))
    state = opt.state[param]
    assert state["cohort"].shape == ((4, 2) if cls is RowMask else (2, 4))
    counts = state["step"][state["cohort"].long()]
    assert (counts if cls is RowMask else counts.t()).tolist() == [[2, 2], [6, 6], [2, 2], [4, 4]]


def test_more_counts_than_a_byte_can_tell_apart_stay_nearly_exact(implementation):
    size, rng = 300, torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(size, generator=rng))
    oracle = Simulated(param.detach(), weight_decay=0.0)
    opt = SparseMaskedAdamW([param], lr=1e-2, weight_decay=0.0)
    start = param.detach().double().clone()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for t in range(1, size + 1):
            active = torch.arange(size) < t
            opt.set_masks({param: ElementMask(active)})
            oracle.open(active)
            param.grad = 1 + 0.1 * torch.randn(size, generator=rng)
            oracle.step(param.grad)
            opt.step()
            assert len(told) == (t > 256)
    assert "parameter number 0 of group 0: its entries have more than 256 different step counts" in str(told[0].message)
    assert opt.state[param]["step"].numel() == 256
    moved, expected = param.detach().double() - start, oracle.value - start
    torch.testing.assert_close(moved, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("cls, dim", [(RowMask, 0), (ColumnMask, 1)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_gain_scales_the_whole_update(implementation, cls, dim, dtype):
    rng, shape = torch.Generator().manual_seed(0), (6, 8)
    param = nn.Parameter(torch.randn(shape, generator=rng).to(dtype))
    oracle = Simulated(param.detach())
    gains = [torch.tensor([0.5, 2.0, 0.01]), torch.tensor([3.0, 1.0, 0.25])]
    opt = SparseMaskedAdamW([param], lr=1e-2, weight_decay=0.1)
    for gain in gains:
        mask = cls([4, 0, 3], shape, gain=gain)
        opt.set_masks({param: mask})
        oracle.open(mask.to_dense())
        factor = torch.ones(shape[dim])
        factor[[4, 0, 3]] = gain
        for _ in range(5):
            param.grad = torch.randn(shape, generator=rng).to(dtype)
            oracle.step(param.grad, factor.double().view(-1, 1) if dim == 0 else factor.double())
            opt.step()
    active = mask.to_dense()
    value = param if dtype == torch.float32 else spread(opt, param, "master")
    torch.testing.assert_close(value.double()[active], oracle.value[active], rtol=2e-6, atol=2e-6)
    assert opt.state[param]["step"].item() == 10
