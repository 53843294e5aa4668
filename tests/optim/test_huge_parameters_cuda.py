"""A parameter of more than 2^31 entries: offsets past 32 bits, by rows and by single weights."""

import gc

import pytest
import torch
from cases.adamw import bits
from cases.cuda_device import DEVICE, ON_GPU, THERE, needs_device, random
from torch import nn

from sparse_cl import ElementMask, RowMask, SparseMaskedAdamW
from sparse_cl.nn import activate

#: Parameter, gradient, copy and what packing a mask takes; each entry is 2 bytes.
NEEDED = 32 << 30
ROOM = not (ON_GPU and THERE) or torch.cuda.mem_get_info(DEVICE)[0] >= NEEDED
pytestmark = [needs_device, pytest.mark.skipif(not ROOM, reason="needs 32 GiB of free GPU memory")]

COLUMNS = 2064
ROWS = (2**20 if ON_GPU else 2**8) + 8
#: The first row, the one in which entry 2^31 lies, and some of the last.
CHOSEN = [0, min(2**31 // COLUMNS, ROWS - 9), ROWS - 5, ROWS - 3, ROWS - 1]
OPTIONS = dict(lr=0.02, weight_decay=0.1)


@pytest.fixture(autouse=True)
def freed():
    yield
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def filled(values):
    """All 1/2 but for the chosen rows, so that an access to any other place would show."""
    whole = torch.full((ROWS, COLUMNS), 0.5, dtype=torch.bfloat16, device=DEVICE)
    for row, value in zip(CHOSEN, values, strict=True):
        whole[row] = value.to(DEVICE)
    return whole


def changed_rows(weight, before):
    return (weight.detach().view(torch.int16) != before.view(torch.int16)).any(1).nonzero().view(-1).tolist()


def stepped_alone(start, grads):
    """The chosen rows as a small parameter, on the CPU."""
    small = nn.Parameter(start.clone())
    optimizer = SparseMaskedAdamW([small], **OPTIONS)
    for grad in grads:
        small.grad = grad.clone()
        optimizer.step()
    return small.detach(), optimizer.state[small]


@pytest.mark.parametrize("compact", [False, True], ids=["whole-gradient", "active-layer"])
def test_a_few_rows_of_two_billion_weights(compact):
    start = random(len(CHOSEN), COLUMNS).to(torch.bfloat16)
    grads = [random(len(CHOSEN), COLUMNS, seed=1 + step).to(torch.bfloat16) for step in range(2)]
    mask = RowMask(CHOSEN, (ROWS, COLUMNS))
    whole = filled(start)
    if compact:
        layer = nn.utils.skip_init(nn.Linear, COLUMNS, ROWS, bias=False, device=DEVICE, dtype=torch.bfloat16)
        layer.weight = nn.Parameter(whole)
        activate(layer, {"weight": mask})
        weight, param = layer.weight, layer.active
        optimizer = SparseMaskedAdamW([param], **OPTIONS)
    else:
        weight = param = nn.Parameter(whole)
        optimizer = SparseMaskedAdamW([param], masks={param: mask}, **OPTIONS)
    before = whole.clone()
    for grad in grads:
        param.grad = grad.to(DEVICE, param.dtype) if compact else filled(grad)
        optimizer.step()
        param.grad = None
    assert changed_rows(weight, before) == CHOSEN
    expected, state = stepped_alone(start, grads)
    mine = optimizer.state[param]
    for name in ("exp_avg", "exp_avg_sq", "master"):
        torch.testing.assert_close(mine[name].cpu(), state[name], rtol=1e-5, atol=1e-6)
    rows = torch.stack([weight.detach()[row] for row in CHOSEN])
    assert torch.equal(rows, mine["master"].to(torch.bfloat16))
    # Two roundings of numbers that differ by a little.
    torch.testing.assert_close(rows.cpu(), expected, rtol=2**-7, atol=1e-6)


def test_single_weights_past_two_billion():
    last = ROWS - 1
    spots = [(0, 1), (CHOSEN[1], 0), (CHOSEN[1], COLUMNS - 1), (last, 0), (last, COLUMNS - 2), (last, COLUMNS - 1)]
    start = random(len(CHOSEN), COLUMNS).to(torch.bfloat16)
    grads = [random(len(CHOSEN), COLUMNS, seed=1 + step).to(torch.bfloat16) for step in range(2)]
    dense = torch.zeros(ROWS, COLUMNS, dtype=torch.bool, device=DEVICE)
    for row, column in spots:
        dense[row, column] = True
    mask = ElementMask(dense)
    del dense
    assert mask.numel == len(spots)
    param = nn.Parameter(filled(start))
    optimizer = SparseMaskedAdamW([param], masks={param: mask}, **OPTIONS)
    before = param.detach().clone()
    for grad in grads:
        param.grad = filled(grad)
        optimizer.step()
        param.grad = None
    assert changed_rows(param, before) == sorted({row for row, _ in spots})
    for row in sorted({row for row, _ in spots}):
        moved = (bits(param.detach()[row]) != bits(before[row])).view(-1, 2).any(1).nonzero().view(-1).tolist()
        assert moved == [column for r, column in spots if r == row]

    def picked(rows):
        return torch.stack([rows[CHOSEN.index(row)][column] for row, column in spots])

    _, state = stepped_alone(picked(start), [picked(grad) for grad in grads])
    for name in ("exp_avg", "exp_avg_sq", "master"):
        torch.testing.assert_close(optimizer.state[param][name].cpu(), state[name], rtol=1e-5, atol=1e-6)
