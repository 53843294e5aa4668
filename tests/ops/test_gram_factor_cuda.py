"""gram_factor on a GPU."""

import cases.gram_factor as cases
import pytest
import torch

from sparse_cl import ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and ops.LOADED["cuda"]), reason="needs a GPU and the CUDA library"
)

op = ops.gram_factor


@pytest.mark.parametrize("name", cases.CASES)
def test_columns_become_orthonormal(name):
    cases.check(op, name, "cuda")


def test_what_is_dependent():
    cases.check_what_is_dependent(op, "cuda")


def test_columns_that_are_not_finite():
    cases.check_columns_that_are_not_finite(op, "cuda")


def test_nearly_orthonormal_columns_keep_their_order():
    cases.check_order(op, "cuda")


@pytest.mark.parametrize("k", [128, 136, 160, 200, 256, 300])
def test_sizes_in_and_past_shared_memory(k):
    y = cases.gaussian(3, 2 * k, k)
    y[1, :, k // 2 :] = y[1, :, : k - k // 2]
    gram, norms = cases.gram_of(y)
    factor, rank = (x.cpu() for x in op(gram.cuda(), norms.cuda(), cases.RTOL))
    assert rank.tolist() == [k, k // 2, k]
    expected = torch.diag_embed((torch.arange(k) < rank[:, None]).double())
    assert (factor.mT @ gram @ factor - expected).abs().max() < 1e-11


def test_repeats_to_the_bit_and_captures_into_a_graph():
    gram, norms = (x.cuda() for x in cases.gram_of(cases.gaussian(200, 80, 40)))
    first, _ = op(gram, norms, cases.RTOL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again, _ = op(gram, norms, cases.RTOL)
    graph.replay()
    assert torch.equal(first, again)
