"""The device of the tests that need a GPU, and parameters of all kinds on it.

``SPARSE_CL_TEST_DEVICE=cpu`` runs the bodies of these tests on the CPU, to show that the tests themselves are right
before there is a GPU: streams, graphs and the watch for host synchronisation then do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import pytest
import torch
from cases.adamw import bits
from torch import Tensor, nn

from sparse_cl import ColumnMask, ElementMask, RowMask, SparseMaskedAdamW, TwoFourMask, ops
from sparse_cl.masks import Mask
from sparse_cl.nn import ActiveLinear

DEVICE = torch.device(os.environ.get("SPARSE_CL_TEST_DEVICE") or "cuda")
ON_GPU = DEVICE.type == "cuda"
if ON_GPU and DEVICE.index is None:
    DEVICE = torch.device("cuda", 0)  # as tensors name it
THERE = not ON_GPU or (torch.cuda.is_available() and ops.LOADED["cuda"])

needs_device = pytest.mark.skipif(not THERE, reason="needs a GPU and the CUDA library")
needs_gpu = pytest.mark.skipif(not (ON_GPU and THERE), reason="shows on a GPU only")
needs_two = pytest.mark.skipif(
    not (ON_GPU and THERE) or torch.cuda.device_count() < 2, reason="needs two GPUs and the CUDA library"
)

SHAPE = (24, 40)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float32 on the CPU, the same wherever a test runs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(shape: tuple[int, int] = SHAPE, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Mask | None]:
    """A mask of each kind, and none."""
    rng = torch.Generator().manual_seed(seed)
    pairs = torch.rand(shape[0], shape[1] // 4, 4, generator=rng).argsort(2) < 2
    found = {
        "dense": None,
        "rows": RowMask(torch.randperm(shape[0], generator=rng)[: shape[0] // 3], shape),
        "columns": ColumnMask(torch.randperm(shape[1], generator=rng)[: shape[1] // 4], shape),
        "elements": ElementMask(torch.rand(shape, generator=rng) < 0.3),
        "two_four": TwoFourMask(pairs.view(shape)),
    }
    return {name: None if mask is None else mask.to(device) for name, mask in found.items()}


class Model:
    """A parameter of each kind, and the leaf of an active layer, with the optimizer that steps them.

    ``masks_on``: where the masks are made; as most users do, on the CPU.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device | str = DEVICE, seed: int = 0, masks_on="cpu", **options
    ):
        self.dtype, self.device = dtype, torch.device(device)
        self.masks = {name: mask for name, mask in masks(device=masks_on, seed=seed).items() if mask is not None}
        names = ["dense", *self.masks]
        self.params = {
            name: nn.Parameter(random(*SHAPE, seed=100 * seed + i).to(device, dtype)) for i, name in enumerate(names)
        }
        self.layer = ActiveLinear(SHAPE[1], SHAPE[0], bias=False, device=device, dtype=dtype, mask=self.masks["rows"])
        with torch.no_grad():
            self.layer.weight.copy_(random(*SHAPE, seed=100 * seed + 50))
        self.layer.refresh()
        named = [*self.params.items(), ("layer.active", self.layer.active)]
        self.optimizer = SparseMaskedAdamW(named, masks=self.masks, **{"lr": 0.05, "weight_decay": 0.1} | options)

    @property
    def trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def written(self) -> dict[str, Tensor]:
        """What a step may write: parameters, and the weight of the active layer with its leaf."""
        return self.params | {"layer.weight": self.layer.weight, "layer.active": self.layer.active}

    def frozen(self, name: str) -> Tensor:
        """Where a step may not write: a bool tensor on the CPU."""
        mask = {"dense": None, "layer.active": None, "layer.weight": self.layer.mask}.get(name, self.masks.get(name))
        shape = self.written[name].shape
        return torch.zeros(shape, dtype=torch.bool) if mask is None else ~mask.to("cpu").to_dense()

    def give(self, seed: int, scale: float = 1.0) -> None:
        """New gradients, written into those that are there, as a captured step needs."""
        for i, p in enumerate(self.trained):
            grad = (scale * random(*p.shape, seed=1000 * seed + i)).to(self.device, p.dtype)
            if p.grad is None:
                p.grad = grad
            else:
                p.grad.copy_(grad)

    def step(self, seed: int) -> None:
        self.give(seed)
        self.optimizer.step()

    def snapshot(self) -> dict[str, Tensor]:
        """The bytes of all that a step writes, and of the state, on the CPU."""
        shown = dict(self.written)
        for i, p in enumerate(self.trained):
            shown |= {f"{i}.{key}": value for key, value in self.optimizer.state[p].items()}
        return {name: bits(value.detach()).cpu().clone() for name, value in shown.items()}


def check_error(got: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """err(got, exact) <= 2 err(plain, exact) + tiny, in the 2-norm, as ``adamw_cases.check_accuracy`` has it."""
    tiny = 1.2e-7 if exact.numel() >= 16 else 1e-5
    error = (got.double() - exact).norm().item()
    allowed = 2 * (plain.double() - exact).norm().item() + tiny * exact.norm().item()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Two snapshots are equal to the bit."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"different: {', '.join(different)}"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, what makes the host wait for the GPU raises an error."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """The replay of a graph of ``function``, which capturing does not run; on the CPU ``function`` itself."""
    if not ON_GPU:
        return function
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def new_streams(count: int) -> Sequence:
    """Streams that begin after what has been launched so far; on the CPU nothing."""
    if not ON_GPU:
        return [None] * count
    streams = [torch.cuda.Stream(DEVICE) for _ in range(count)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(DEVICE))
    return streams


def on(stream):
    """The context in which a stream of :func:`new_streams` is the current one."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def wait() -> None:
    """Until the GPU has done all."""
    if ON_GPU:
        torch.cuda.synchronize(DEVICE)
