"""masked_adamw_ in plain PyTorch, and the bit layouts that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_cl.layout import BLOCK, COLUMNS, DENSE, FIELDS, INDEX_NAME, PER_UNIT, ROWS, SHARED, StateLayout

_U32 = 0xFFFFFFFF

Require = Callable[[bool, str], None]


def pack_bits(dense: Tensor) -> Tensor:
    """A bool tensor as int32 words, entry i in bit i % 32 of word i // 32; missing entries are 0."""
    flat = dense.reshape(-1)
    padding = -flat.numel() % 32
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    weight = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (flat.view(-1, 8).to(torch.uint8) * weight).sum(1, dtype=torch.uint8).view(torch.int32)


def unpack_bits(words: Tensor, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`: a flat bool tensor of ``numel`` entries."""
    place = torch.arange(8, dtype=torch.uint8, device=words.device)
    return ((words.view(torch.uint8)[:, None] >> place) & 1).bool().view(-1)[:numel]


def block_ranks(dense: Tensor) -> Tensor:
    """int64: number of true entries before each block of ``BLOCK`` entries, and at the end their total."""
    flat = dense.reshape(-1)
    padding = -flat.numel() % BLOCK
    if padding:
        flat = torch.cat([flat, flat.new_zeros(padding)])
    counts = flat.view(-1, BLOCK).sum(1)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def active_positions(layout: StateLayout, views: dict[str, Tensor], device: torch.device) -> Tensor:
    """int64: ascending flat positions of the active entries, in the order of the compact state."""
    if layout.kind == DENSE:
        return torch.arange(layout.numel, device=device)
    if layout.kind == ROWS:
        inner = layout.numel // layout.shape[0] if layout.shape[0] else 0
        rows = views["rows"].long()
        return (rows[:, None] * inner + torch.arange(inner, device=device)).view(-1)
    if layout.kind == COLUMNS:
        row = torch.arange(layout.shape[0], device=device) * layout.shape[1]
        return (row[:, None] + views["columns"].long()).view(-1)
    dense = unpack_bits(views[INDEX_NAME[layout.kind]], layout.numel)
    # Their number is known: nonzero would wait for the device to count them.
    return torch.nonzero_static(dense, size=layout.entries).view(-1)


def spread_units(layout: StateLayout, per_unit: Tensor) -> Tensor:
    """A vector of one value a unit, made broadcastable to the compact shape."""
    return per_unit.view(-1, *[1] * (len(layout.shape) - 1)) if layout.kind == ROWS else per_unit


def _hash32(x: Tensor) -> Tensor:
    """Mixes 32-bit integers held in int64 (C. Wellons' lowbias32 constants)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _U32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _U32
    return x ^ (x >> 16)


def random_bits(seed: int, step: Tensor, entry: Tensor) -> Tensor:
    """The 32 random bits (in int64) of each entry at its ``step``; a pure function, so runs repeat exactly."""
    key = _hash32((_hash32(step.long() & _U32) + seed * 0x9E3779B9 + (entry >> 32) * 0x85EBCA6B) & _U32)
    return _hash32((entry & _U32) ^ key)


def stochastic_round(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 ``x`` to bfloat16 or float16, up with the probability that makes it unbiased.

    ``bits`` are 32 random bits in int64. Values that are not finite, or above the largest finite one, round as usual.
    """
    if dtype == torch.bfloat16:
        whole = x.contiguous().view(torch.int32).long() & _U32
        rounded = (whole + (bits & 0xFFFF)) & 0xFFFF0000
    else:
        # Below 2^-14 the spacing of float16 no longer shrinks: work on multiples of 2^-24 there.
        tiny = x.abs() < 2.0**-14
        units = torch.floor(x.abs() * 2.0**24 + (bits & 0x1FFF) * 2.0**-13) * 2.0**-24
        small = torch.copysign(units, x)
        whole = x.contiguous().view(torch.int32).long() & _U32
        rounded = (whole + (bits & 0x1FFF)) & 0xFFFFE000
    rounded = torch.where(rounded >= 2**31, rounded - 2**32, rounded).to(torch.int32).view(torch.float32)
    if dtype == torch.float16:
        rounded = torch.where(tiny, small, rounded)
    finite = x.isfinite() & (x.abs() <= torch.finfo(dtype).max)
    return torch.where(finite, rounded, x).to(dtype)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    updates: Sequence[Tensor],
    layout: Tensor,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2019) of the active entries of each parameter, in place.

    Args:
        params: floating-point tensors of any shape.
        grads: tensors of the same shapes, or of the compact shape where ``layout`` says so, in the parameter's dtype
            or float32.
        states: uint8 buffers laid out as :class:`~sparse_cl.layout.StateLayout` says.
        updates: empty, or one contiguous tensor per parameter in its compact shape and its state's dtype. Where they
            are given, each gets the update of its parameter, new - old of the weights that are stepped (the master
            where there is one), decay and gain included; moments and step counts advance, and neither parameters nor
            masters change.
        layout: int64, one row of ``layout.FIELDS`` a parameter, on the CPU.
        lr, lr_tensor: learning rate; the tensor (one element, on the parameters' device) wins if given.
        grad_scale: one element; gradients are divided by it.
        found_inf: one element; unless it is zero, nothing changes, step counts included, and updates become zero.

    Where ``layout`` says "by_row", v is one number a row, of which the mean of g^2 over the row takes the place of g^2
    (Adam-mini, Zhang et al. 2024). Bias correction uses each entry's own step count. A gain g scales the entry's whole
    update:
    p <- p - g (lr wd p + lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)).
    """
    scalars = (lr_tensor, grad_scale, found_inf)
    layouts = check_call("masked_adamw_", params, states, updates, layout, scalars, grads)
    if found_inf is not None and bool(found_inf):
        for update in updates:
            update.zero_()
        return
    rate = lr if lr_tensor is None else lr_tensor.double().reshape(())
    for i, (param, grad, state, where) in enumerate(zip(params, grads, states, layouts, strict=True)):
        if where.entries == 0:
            continue
        view = where.views(state)
        old, new = _step_one(param, grad, where, view, rate, beta1, beta2, eps, weight_decay, maximize, grad_scale)
        if updates:
            torch.sub(new, old, out=updates[i])
        else:
            write_weights(param, where, view, new)


def check_call(
    op: str,
    params: Sequence[Tensor],
    states: Sequence[Tensor],
    updates: Sequence[Tensor],
    layout: Tensor,
    scalars: Sequence[Tensor | None],
    grads: Sequence[Tensor] | None,
) -> list[StateLayout]:
    """The layouts of a call, after everything that could fail once a parameter has been written.

    Args:
        grads: None for an op that takes none, which must be given updates.
    """
    require, count = requirement(op), len(params)
    if grads is None:
        require(len(states) == len(updates) == count, f"expected as many updates and states as params ({count})")
    else:
        require(len(grads) == len(states) == count, f"expected as many grads and states as params ({count})")
        require(len(updates) in (0, count), f"updates: expected none, or as many as params ({count})")
    rows = rows_of(layout, count, require)
    for scalar in scalars:
        if scalar is not None and count:
            require(
                scalar.numel() == 1 and scalar.dtype == torch.float32 and scalar.device == params[0].device,
                "lr_tensor, grad_scale and found_inf: expected one float32 element on the parameters' device",
            )
    layouts = []
    for i, (param, state, row) in enumerate(zip(params, states, rows, strict=True)):
        where = StateLayout.from_row(row, param.shape, param.dtype)
        require(param.dtype.is_floating_point, f"params[{i}]: expected float32, bfloat16, float16 or float64")
        require(
            params[0].device == param.device == state.device,
            f"params[{i}] and its state: expected both on one device, that of params[0]",
        )
        if grads is not None:
            _check_gradient(require, i, param, grads[i], where)
        check_state(i, state, require)
        require(where.is_valid() and where.row() == row, f"layout[{i}]: not a row that StateLayout.row() makes for it")
        if where.entries:
            require(state.numel() == where.nbytes, f"states[{i}]: does not hold what layout[{i}] says")
        if updates:
            update = updates[i]
            require(
                update.shape == where.compact_shape
                and update.dtype == where.dtype
                and update.device == param.device
                and update.is_contiguous(),
                f"updates[{i}]: expected a contiguous {where.dtype} tensor of the compact shape of params[{i}], "
                f"{where.compact_shape}, on its device",
            )
        layouts.append(where)
    return layouts


def requirement(op: str) -> Require:
    """What raises an error in the name of ``op`` where something does not hold."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            raise RuntimeError(f"{op}: {message}")

    return require


def rows_of(layout: Tensor, count: int, require: Require) -> list[list[int]]:
    """The rows of an op's ``layout`` tensor, which must be ``count``."""
    fits = layout.device.type == "cpu" and layout.dtype == torch.int64 and layout.shape == (count, len(FIELDS))
    require(fits, f"layout: expected an int64 CPU tensor of shape ({count}, {len(FIELDS)})")
    return layout.tolist()


def check_state(i: int, state: Tensor, require: Require) -> None:
    fits = state.dtype == torch.uint8 and state.is_contiguous() and state.dim() == 1
    require(fits, f"states[{i}]: expected a contiguous uint8 vector")


def _check_gradient(require: Require, i: int, param: Tensor, grad: Tensor, where: StateLayout) -> None:
    what = "compact shape" if where.compact_grad and where.is_valid() else "shape"
    fits = grad.shape == (where.grad_shape if where.is_valid() else param.shape)
    require(fits, f"grads[{i}]: expected the {what} of params[{i}]")
    require(grad.device == param.device, f"params[{i}] and its gradient: expected both on one device")
    require(grad.dtype in (param.dtype, torch.float32), f"grads[{i}]: expected the dtype of params[{i}] or float32")


def read_weights(param: Tensor, where: StateLayout, view: dict[str, Tensor]) -> Tensor:
    """The active weights that are stepped, in the compact shape and the state's dtype; may share memory with them."""
    return view["master"] if where.master else _compact(param, where, view).to(where.dtype)


def write_weights(param: Tensor, where: StateLayout, view: dict[str, Tensor], new: Tensor) -> None:
    """Writes what :func:`read_weights` gave, changed, into the master and, rounded, into the parameter.

    Half-precision parameters without a master are rounded stochastically, with the random bits of each entry's present
    step count.
    """
    if where.master:
        view["master"].copy_(new)
    elif param.dtype in (torch.bfloat16, torch.float16):
        entry = torch.arange(where.entries, device=param.device).view(where.compact_shape)
        bits = random_bits(where.seed, _steps(where, view).expand(where.compact_shape), entry)
        new = stochastic_round(new, bits, param.dtype)
    new = new.to(param.dtype)
    if where.kind == DENSE:
        param.copy_(new)
        return
    positions = active_positions(where, view, param.device)
    if param.is_contiguous():
        param.view(-1).index_copy_(0, positions, new.view(-1))
    else:
        flat = param.reshape(-1)
        flat[positions] = new.view(-1)
        param.copy_(flat.view(where.shape))


def _compact(x: Tensor, where: StateLayout, view: dict[str, Tensor]) -> Tensor:
    if where.kind == DENSE:
        return x.reshape(where.shape)
    return x.reshape(-1)[active_positions(where, view, x.device)].view(where.compact_shape)


def _steps(where: StateLayout, view: dict[str, Tensor]) -> Tensor:
    """The step counts, float64, broadcastable to the compact shape."""
    step = view["step"].double()
    if where.cohort_scope == SHARED:
        return step
    step = step.view(-1)[view["cohort"].long()]
    return spread_units(where, step) if where.cohort_scope == PER_UNIT else step


def _step_one(
    param: Tensor,
    grad: Tensor,
    where: StateLayout,
    view: dict[str, Tensor],
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The active weights before and after; writes moments and step counts only."""
    dtype = where.dtype
    g = (grad if where.compact_grad else _compact(grad, where, view)).to(dtype)
    if grad_scale is not None:
        g = g / grad_scale.to(dtype)
    if maximize:
        g = -g

    view["step"].add_(1)
    step = _steps(where, view)
    gain = spread_units(where, view["gain"].double()) if where.gain else 1.0
    step_size = (gain * lr / (1 - beta1**step)).to(dtype)
    sqrt_correction = (1 - beta2**step).sqrt().to(dtype)
    decay = torch.as_tensor(1 - gain * lr * weight_decay, dtype=torch.float64, device=param.device).to(dtype)

    exp_avg, exp_avg_sq = view["exp_avg"], view["exp_avg_sq"]
    exp_avg.lerp_(g, 1 - beta1)
    if where.by_row:
        weight = (1 - beta2) / max(1, where.inner)
        exp_avg_sq.mul_(beta2).add_((g * weight * g).sum(1, keepdim=True))
    else:
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    second = exp_avg_sq
    if where.amsgrad:
        second = torch.maximum(view["max_exp_avg_sq"], exp_avg_sq, out=view["max_exp_avg_sq"])
    old = read_weights(param, where, view)
    return old, old * decay - step_size * (exp_avg / (second.sqrt() / sqrt_correction + eps))
