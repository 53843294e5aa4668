"""project_out_ against float64, in place and within bounded memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl import linalg
from sparse_cl.linalg import project_out_

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis_for(x, r, seed=1):
    q = torch.linalg.qr(gaussian(*x.shape[:-2], x.shape[-1], r, seed=seed, dtype=torch.float64))[0]
    return q.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def oracle(x, basis, onto=False):
    wide, basis = x.double(), basis.double()
    inside = wide @ basis @ basis.mT
    return inside if onto else wide - inside


def plain(x, basis):
    """The textbook formula in the precision of the basis, rounded once to x's dtype."""
    wide = x.to(basis.dtype)
    return (wide - wide @ basis @ basis.mT).to(x.dtype)


def check(x, basis):
    mine = x.clone(memory_format=torch.preserve_format)
    expected, textbook = oracle(x, basis), plain(x, basis)
    assert project_out_(mine, basis) is mine
    assert mine.dtype == x.dtype
    error, its_error = ((y.double() - expected).abs().max() if x.numel() else 0 for y in (mine, textbook))
    assert error <= 2 * its_error + 8 * torch.finfo(basis.dtype).eps * (x.abs().max() if x.numel() else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "r"),
    [((1, 1), 1), ((5, 7), 3), ((64, 33), 33), ((129, 256), 0), ((3, 40, 65), 17), ((2, 3, 9, 20), 5), ((0, 4), 2)],
)
def test_against_float64(shape, r, dtype):
    x = gaussian(*shape, dtype=dtype)
    check(x, basis_for(x, r))
    check(x, basis_for(x[(0,) * (x.dim() - 2)], r) if all(shape) else basis_for(x, r))


@given(
    m=st.integers(0, 20),
    n=st.integers(1, 30),
    r=st.integers(0, 30),
    batch=st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(m, n, r, batch, dtype):
    x = gaussian(*batch, m, n, dtype=dtype)
    check(x, basis_for(x, min(r, n)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_tensors(dtype):
    whole = gaussian(6, 40, 30, dtype=dtype)
    for view in (whole[::2], whole.mT, whole[:, ::3, 1::2], whole.transpose(0, 1)):
        assert not view.is_contiguous()
        for basis in (basis_for(view, 9), basis_for(view[0], 9)):
            storage = whole.clone()
            mine = storage.as_strided(view.shape, view.stride(), view.storage_offset())
            untouched = torch.ones_like(storage, dtype=torch.bool)
            untouched.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
            project_out_(mine, basis)
            expected = plain(view, basis)
            torch.testing.assert_close(mine, expected, rtol=0, atol=4 * torch.finfo(dtype).eps * 8)
            assert torch.equal(storage[untouched], whole[untouched])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_taken_some_at_a_time(dtype, monkeypatch):
    x = gaussian(70, 33, dtype=dtype)
    basis = basis_for(x, 8)
    at_once = project_out_(x.clone(), basis)
    monkeypatch.setitem(linalg._CHUNK, "cpu", 100)
    torch.testing.assert_close(project_out_(x.clone(), basis), at_once, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_twice_is_once():
    x = gaussian(50, 200, dtype=torch.float64)
    basis = basis_for(x, 60)
    outside = project_out_(x.clone(), basis)
    torch.testing.assert_close(project_out_(outside.clone(), basis), outside, rtol=0, atol=1e-13)


@pytest.mark.parametrize("share", [0.5, 0.99])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_leak_in_float32_whatever_precision_the_caller_allows(share, precision):
    """Share of the energy left in the subspace; with TF32 products it would be 6e-6 at a share of .99."""
    x = gaussian(200, 512, dtype=torch.float64)
    basis = basis_for(x, 128)
    inside, outside = oracle(x, basis, onto=True), oracle(x, basis)
    x = (inside / inside.norm() * share**0.5 + outside / outside.norm() * (1 - share) ** 0.5).float()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            project_out_(x, basis.float())
    finally:
        torch.set_float32_matmul_precision(before)
    assert (x.double() @ basis).square().sum() / x.double().square().sum() <= 1e-10


class _Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Sizes, in bytes, of the storages that the operations inside it make."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        known = {a.untyped_storage().data_ptr() for a in given}
        out = func(*args, **kwargs)
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("shape", [(600, 300), (4, 150, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temporary_of_the_size_of_x(dtype, shape, monkeypatch):
    """Coefficients, and at most a chunk in float32."""
    monkeypatch.setitem(linalg._CHUNK, "cpu", 3000)
    x = gaussian(*shape, dtype=dtype)
    basis = basis_for(x, 10)
    with _Allocations() as made:
        project_out_(x, basis)
    assert made.sizes
    assert max(made.sizes) <= max(600 * 10, 3000) * 4


@pytest.mark.parametrize("shape", [(20, 10), (3, 20, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_is_projected_without_a_graph(dtype, shape, monkeypatch):
    monkeypatch.setitem(linalg._CHUNK, "cpu", 50)
    x = torch.nn.Parameter(gaussian(*shape, dtype=dtype))
    basis = basis_for(x, 3)
    version = x._version
    assert project_out_(x, basis) is x
    assert x.grad_fn is None and x._version > version
