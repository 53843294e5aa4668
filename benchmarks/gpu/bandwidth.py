"""masked_adamw_ on a GPU against torch's fused AdamW, beside the copy bandwidth of the same process.

    python benchmarks/gpu/bandwidth.py --json out/gpu.json [--tiny]

Times are medians of CUDA events around whole steps of Llama-3-8B's parameter list, which is far beyond the L2 cache;
where memory does not hold it, with fewer layers of the same shapes.

GB/s counts what a step cannot do without: of each active entry the gradient and the state once read, the parameter and
the state once written, the parameter once read where there is no master (28 bytes in float32, and in bfloat16 with a
master). Of element, column and 2:4 masks, gradient and parameter count by the 32-byte sectors that hold an active
entry, and the bits of a mask once. Indices of rows and columns, ranks and step counts are left out. Where a kernel
reads a sector twice, or two sectors for one, that shows as a lower share of the copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.run import DEVICE, ON_GPU, Run, Skipped, device_bytes, free, host_ms, main, median_ms
from benchmarks.random_masks import mask_for
from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW, TwoFourMask, ops
from sparse_cl.layout import DENSE, StateLayout, state_dtype

LR = 1e-3
LAYERS = 32
SECTOR = 32
HALF, FULL = torch.bfloat16, torch.float32

Shapes = list[tuple[int, ...]]

#: Name: dtype of the parameters, mask, density, master, compact gradient.
CASES = {
    "dense fp32": (FULL, "dense", 1.0, False, False),
    "rows 5 % fp32": (FULL, "rows", 0.05, False, False),
    "elements 5 % fp32": (FULL, "elements", 0.05, False, False),
    "rows 25 % fp32": (FULL, "rows", 0.25, False, False),
    "columns 5 % fp32": (FULL, "columns", 0.05, False, False),
    "columns 5 % fp32, compact gradient": (FULL, "columns", 0.05, False, True),
    "elements 5 % fp32, in a band of rows": (FULL, "band", 0.05, False, False),
    "2:4 fp32": (FULL, "two-four", 0.5, False, False),
    "dense bf16, master": (HALF, "dense", 1.0, True, False),
    "dense bf16, no master": (HALF, "dense", 1.0, False, False),
    "rows 5 % bf16, master": (HALF, "rows", 0.05, True, False),
    "elements 5 % bf16, master": (HALF, "elements", 0.05, True, False),
}
#: Cases that are measured again with the L2 cache asked to fetch single sectors.
FETCHES = ("columns 5 % fp32", "elements 5 % fp32")


def llama_shapes(layers: int = LAYERS) -> Shapes:
    """Shapes of Llama-3-8B's parameters; 291 tensors at 32 layers."""
    square, narrow, up, down = (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)
    layer = [square, narrow, narrow, square, up, up, down, (4096,), (4096,)]
    return [(128256, 4096), *layer * layers, (4096,), (128256, 4096)]


def layers_that_fit(bytes_per_parameter: float) -> int:
    def needed(layers: int) -> float:
        return bytes_per_parameter * sum(torch.Size(s).numel() for s in llama_shapes(layers))

    return max((n for n in range(1, LAYERS + 1) if needed(n) < 0.85 * device_bytes()), default=1)


def copy_bandwidth(entries: int) -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.randn(entries, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6


def touched(mask, shape: tuple[int, ...], per_sector: int) -> int:
    """Entries of the sectors that hold an active one."""
    if isinstance(mask, ElementMask):
        sectors = mask.index.view(torch.uint8).view(-1, per_sector // 8).any(1)
        return per_sector * int(sectors.sum())
    if isinstance(mask, ColumnMask):
        return shape[0] * per_sector * (mask.index // per_sector).unique().numel()
    return mask.numel if isinstance(mask, RowMask) else torch.Size(shape).numel()


class Ours:
    """One parameter list with masks, stepped by the op alone."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, kind: str, density=1.0, master=False, compact=False):
        self.params, self.grads, self.states = [], [], []
        rows, self.bytes, self.entries = [], 0.0, 0
        for shape in shapes:
            mask = mask_for(kind, shape, density, DEVICE)
            options = dict(master=master, compact_grad=compact and isinstance(mask, ColumnMask))
            if mask is None:
                layout = StateLayout(DENSE, shape, torch.Size(shape).numel(), state_dtype(dtype), **options)
            else:
                layout = mask.layout(dtype, **options)
            buffer, views = layout.allocate(torch.device(DEVICE))
            for name, section in mask.sections().items() if mask is not None else ():
                views[name].copy_(section)
            # Zeros would move as many bytes, but leave the arithmetic and the power that it draws out of the time.
            views["exp_avg"].normal_()
            views["exp_avg_sq"].uniform_()
            if master and layout.entries:
                views["master"].normal_()
            self.params.append(torch.randn(shape, device=DEVICE, dtype=dtype))
            self.grads.append(torch.randn(layout.grad_shape, device=DEVICE, dtype=dtype))
            self.states.append(buffer)
            rows.append(layout.row())
            self.entries += layout.entries
            self.bytes += self._traffic(layout, self.params[-1], mask)
        self.layout = torch.tensor(rows, dtype=torch.int64)

    @staticmethod
    def _traffic(layout: StateLayout, param: Tensor, mask) -> float:
        weight = param.element_size()
        state = (6 if layout.master else 4) * layout.dtype.itemsize * layout.entries
        passes = 1 if layout.master else 2  # of the parameter: it is read only where there is no master
        entries = layout.entries if mask is None else touched(mask, tuple(param.shape), SECTOR // weight)
        gradient = layout.entries if layout.compact_grad else entries
        bits = param.numel() / 8 if isinstance(mask, ElementMask | TwoFourMask) else 0
        return weight * (passes * entries + gradient) + state + bits

    def step(self) -> None:
        ops.masked_adamw_(
            params=self.params,
            grads=self.grads,
            states=self.states,
            updates=[],
            layout=self.layout,
            lr=LR,
            lr_tensor=None,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.01,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )


def fused_ms(shapes: Shapes, dtype: torch.dtype) -> float:
    """Milliseconds of a step of torch's fused AdamW."""
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE, dtype=dtype)) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return median_ms(torch.optim.AdamW(params, lr=LR, fused=True).step)


@contextmanager
def fetch_granularity(size: int) -> Iterator[int]:
    """Asks the L2 cache to fetch so many bytes at once, and sets back what was; gives what the driver agreed to."""
    if not ON_GPU:
        raise Skipped("the L2 cache of a GPU is what is set")
    driver, limit = ctypes.CDLL("libcuda.so.1"), 5  # CU_LIMIT_MAX_L2_FETCH_GRANULARITY

    def put(value: int) -> None:
        if code := driver.cuCtxSetLimit(limit, ctypes.c_size_t(value)):
            raise RuntimeError(f"cuCtxSetLimit returned {code}")

    def get() -> int:
        value = ctypes.c_size_t()
        if code := driver.cuCtxGetLimit(ctypes.byref(value), limit):
            raise RuntimeError(f"cuCtxGetLimit returned {code}")
        return value.value

    torch.cuda.synchronize()
    before = get()
    put(size)
    try:
        yield get()
    finally:
        torch.cuda.synchronize()
        put(before)


def host_times(tensors: int) -> dict[str, float]:
    """Milliseconds of host time of a step of so many small tensors."""

    def optimizer(make: Callable) -> float:
        params = [torch.nn.Parameter(torch.randn(64, 64, device=DEVICE)) for _ in range(tensors)]
        for param in params:
            param.grad = torch.randn_like(param)
        return host_ms(make(params).step)

    def half_the_rows(params) -> SparseMaskedAdamW:
        return SparseMaskedAdamW(params, lr=LR, masks={p: RowMask(range(0, 64, 2), p.shape) for p in params})

    return {
        "op_ms": host_ms(Ours([(64, 64)] * tensors, FULL, "rows", 0.5).step),
        "optimizer_ms": optimizer(half_the_rows),
        "torch_fused_ms": optimizer(partial(torch.optim.AdamW, lr=LR, fused=True)),
    }


class Peers:
    """What every case is held against: measured once in this process, and only if a case asks."""

    def __init__(self, tiny: bool):
        self.tiny, self._fused = tiny, {}
        # Both sides of a comparison step the same list: what the dense step of either needs.
        self.layers = {dtype: 1 if tiny else layers_that_fit(b) for dtype, b in ((FULL, 16), (HALF, 17))}
        self.copy = 0.0

    def shapes(self, dtype: torch.dtype) -> Shapes:
        return [(96, 64), (64, 96), (64,)] if self.tiny else llama_shapes(self.layers[dtype])

    def measure(self, dtype: torch.dtype) -> float:
        if not self.copy:
            self.copy = copy_bandwidth(1 << (12 if self.tiny else 29))
            free()
        if dtype not in self._fused:
            self._fused[dtype] = fused_ms(self.shapes(dtype), dtype)
            free()
        return self._fused[dtype]


def measure(peers: Peers, name: str, granularity: int | None = None) -> dict:
    dtype, kind, density, master, compact = CASES[name]
    fused, shapes = peers.measure(dtype), peers.shapes(dtype)
    problem, figures = Ours(shapes, dtype, kind, density, master, compact), {}
    if granularity is None:
        ms = median_ms(problem.step)
    else:
        with fetch_granularity(granularity) as agreed:
            figures["fetch_granularity"] = agreed
            ms = median_ms(problem.step)
    return {
        **figures,
        "ms": ms,
        "torch_fused_ms": fused,
        "torch_fused_dtype": str(dtype).removeprefix("torch."),
        "speedup": fused / ms,
        "gb_per_s": problem.bytes / ms / 1e6,
        "of_copy": problem.bytes / ms / 1e6 / peers.copy,
        "copy_gb_per_s": peers.copy,
        "entries": problem.entries,
        "layers": peers.layers[dtype],
        "tensors": len(shapes),
    }


def cases(run: Run) -> None:
    peers = Peers(run.tiny)
    for name in CASES:
        run.case(name, partial(measure, peers, name), needs=3)
    for name in FETCHES:
        run.case(f"{name}, fetched by sectors", partial(measure, peers, name, SECTOR), needs=3)
    run.case("host time", lambda: host_times(3 if run.tiny else len(llama_shapes())), needs=2)


if __name__ == "__main__":
    main("bandwidth", __doc__, cases)
