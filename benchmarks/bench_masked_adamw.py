"""One optimizer step against the reference, torch's AdamW, and where installed bitsandbytes and torchao.

Run: ``pytest benchmarks`` (``-k 'rows and native'`` for a part). Parameters are Llama-shaped and many times larger
than any cache; ``GB/s`` counts the bytes that a step must move at least, beside the copy bandwidth of the process.
"""

import gc
import importlib.util

import pytest
import torch

from benchmarks.random_masks import mask_for
from sparse_cl import RowMask, SparseMaskedAdamW, ops, reference

# q, o, k, up and down of one layer of Llama-3-8B: 155 million parameters.
SHAPES = [(4096, 4096), (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]

# Name: parameter dtype, kind and density of the mask, master weights.
CASES = {
    "fp32 dense": (torch.float32, None, True),
    "fp32 rows 5 %": (torch.float32, ("rows", 0.05), True),
    "fp32 rows 25 %": (torch.float32, ("rows", 0.25), True),
    "fp32 columns 5 %": (torch.float32, ("columns", 0.05), True),
    "fp32 elements 5 %": (torch.float32, ("elements", 0.05), True),
    "fp32 2:4": (torch.float32, ("two-four", 0.5), True),
    "bf16 dense, no master": (torch.bfloat16, None, False),
    "bf16 dense, master": (torch.bfloat16, None, True),
    "bf16 rows 5 %, master": (torch.bfloat16, ("rows", 0.05), True),
    "bf16 elements 5 %, master": (torch.bfloat16, ("elements", 0.05), True),
}
CONTENDERS = ["native", "reference", "torch fused", "torch foreach", "bitsandbytes 8-bit", "torchao 8-bit"]


def make_params(dtype, device):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.empty(s, dtype=dtype, device=device).uniform_(-0.02, 0.02)) for s in SHAPES]
    for p in params:
        p.grad = torch.empty_like(p).uniform_(-1e-3, 1e-3)
    return params


def make_optimizer(contender, params, mask, master):
    if contender in ("native", "reference"):
        kind, density = mask or (None, 1.0)
        masks = {p: mask_for(kind, tuple(p.shape), density, p.device) for p in params} if mask else None
        return SparseMaskedAdamW(params, masks=masks, master_weights=master)
    if contender.startswith("torch "):
        return torch.optim.AdamW(params, **{contender.split()[1]: True})
    package, module, name = {
        "bitsandbytes 8-bit": ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
        "torchao 8-bit": ("torchao", "torchao.optim", "AdamW8bit"),
    }[contender]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return getattr(importlib.import_module(module), name)(params)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", CASES)
def test_step(benchmark, monkeypatch, device, waiting, copy_gb_per_s, case, contender):
    dtype, mask, master = CASES[case]
    if contender in CONTENDERS[3:] and mask is not None:
        pytest.skip("a peer without masks: see the dense case")
    if contender == "native" and not ops.LOADED[device.type]:
        pytest.skip("no native library is built")
    if contender == "reference":
        monkeypatch.setattr(ops, "masked_adamw_", reference.masked_adamw_)
    params = make_params(dtype, device)
    optimizer = make_optimizer(contender, params, mask, master)
    optimizer.step()

    numel = sum(p.numel() for p in params)
    width = dtype.itemsize
    if isinstance(optimizer, SparseMaskedAdamW):
        active = sum(m.numel for m in optimizer.masks.values()) if mask else numel
        moved = active * (3 * width + 16 + (8 - width if width == 2 and master else 0))
    else:
        moved = numel * 7 * width
    benchmark.group = case
    benchmark.extra_info.update(
        case=case, contender=contender, baseline="torch fused", bytes=moved, copy_gb_per_s=copy_gb_per_s
    )
    benchmark.pedantic(waiting(optimizer.step), rounds=3 if contender == "reference" else 9, warmup_rounds=1)
    del optimizer, params
    gc.collect()


def test_host_time_of_a_step(benchmark):
    """A Llama-3-8B has 291 tensors; here each is tiny, so that the time is the host's."""
    params = [(f"p{i}", torch.nn.Parameter(torch.ones(16, 4))) for i in range(291)]
    for _, p in params:
        p.grad = torch.ones_like(p)
    optimizer = SparseMaskedAdamW(params, masks={n: RowMask([1], (16, 4)) for n, _ in params[:226]})
    optimizer.step()
    benchmark.group = "host time, 291 tensors"
    benchmark.pedantic(optimizer.step, rounds=200, warmup_rounds=20)
