"""masked_adamw_ on a GPU."""

import pytest
import torch
from cases.adamw import FLOAT_GRADIENTS, OPTIONS, SAME_DTYPES, Case, check_step, kinds, make_problem, same_random_bits

from sparse_cl import ops, reference
from sparse_cl.layout import COLUMNS, DENSE, ELEMENTS, PER_ENTRY, PER_UNIT, ROWS, TWO_FOUR

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and ops.LOADED["cuda"]), reason="needs a GPU and the CUDA library"
)

op = ops.masked_adamw_


def assert_same(first, second):
    for a, b in zip([*first.params, *first.states], [*second.params, *second.states], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_agrees_with_the_oracle_and_leaves_the_rest(dtype, options):
    check_step(op, [c for master in (False, True) for c in kinds(dtype, master=master, **options)], "cuda", steps=3)


@pytest.mark.parametrize("dtype", FLOAT_GRADIENTS.values(), ids=FLOAT_GRADIENTS)
def test_float32_gradients(dtype):
    for options in (dict(amsgrad=True, master=True), dict(cohorts=3, scope=PER_ENTRY)):
        check_step(op, kinds(dtype, grad_dtype=torch.float32, **options), "cuda", steps=2)


@pytest.mark.parametrize("dtype", SAME_DTYPES.values(), ids=SAME_DTYPES)
def test_sizes_past_the_cache(dtype):
    cases = [
        Case(shape=(4096, 4099)),
        Case(kind=ROWS, shape=(14336, 1024), density=0.05, gain=True),
        Case(kind=ROWS, shape=(3001, 4097), density=0.3),
        Case(kind=COLUMNS, shape=(2048, 7168), density=0.1, cohorts=200, scope=PER_UNIT),
        Case(kind=ELEMENTS, shape=(4096, 2053), density=0.05),
        Case(kind=ELEMENTS, shape=(2048, 2048), density=0.7, cohorts=256, scope=PER_ENTRY),
        Case(kind=ELEMENTS, shape=(4096, 4096), density=1e-5),
        Case(kind=TWO_FOUR, shape=(2048, 4100)),
    ]
    check_step(op, [Case(**(vars(case) | dict(dtype=dtype))) for case in cases], "cuda", steps=2)


@pytest.mark.parametrize(
    "hyper",
    [
        dict(maximize=True, weight_decay=0.0),
        dict(lr_tensor=0.01, grad_scale=3.0),
        dict(grad_scale=1024.0, found_inf=0.0),
    ],
)
def test_hyperparameters(hyper):
    hyper = {
        k: torch.tensor(v, device="cuda") if k in ("lr_tensor", "grad_scale", "found_inf") else v
        for k, v in hyper.items()
    }
    check_step(op, kinds(torch.bfloat16, master=True), "cuda", **hyper)


def test_found_inf_changes_nothing():
    before = make_problem(kinds(torch.bfloat16), "cuda")
    after = before.clone()
    after.step(op, found_inf=torch.ones((), device="cuda"))
    assert_same(before, after)


def test_random_bits_are_the_reference_s():
    for dtype in (torch.bfloat16, torch.float16):
        mine = make_problem(kinds(dtype, cohorts=3, scope=PER_ENTRY), "cuda")
        plain = mine.clone()
        mine.step(op)
        plain.step(reference.masked_adamw_)
        assert min(same_random_bits(mine, plain, i) for i in range(len(mine.params))) > 0.99


def test_repeats_to_the_bit_and_over_many_steps():
    """Three runs; a lost or doubled advance of the step counts would show, since every block takes part in it."""
    runs = []
    for _ in range(3):
        problem = make_problem([Case(shape=(2048, 2048)), *kinds(torch.bfloat16)], "cuda")
        counts = [problem.views(i)["step"].clone() for i in range(len(problem.params))]
        for _ in range(50):
            problem.step(op)
        for i, count in enumerate(counts):
            assert torch.equal(problem.views(i)["step"], count + 50)
        runs.append(problem)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


def test_does_not_synchronize():
    problem = make_problem([*kinds(), *kinds(torch.bfloat16, master=True, strided=True)], "cuda")
    scalars = dict(lr_tensor=torch.tensor(0.1, device="cuda"), found_inf=torch.zeros((), device="cuda"))
    problem.step(op, **scalars)
    before = problem.views(0)["step"].clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.step(op, **scalars)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(problem.views(0)["step"], before + 1)


def test_graph_replays_equal_eager_steps():
    eager = make_problem([Case(shape=(512, 4096)), *kinds(torch.bfloat16)], "cuda")
    graphed = eager.clone()
    lr = torch.tensor(0.1, device="cuda")
    make_problem([Case(), Case(dtype=torch.bfloat16)], "cuda").step(op)  # load the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step(op, lr_tensor=lr)
    for rate in (0.1, 0.05, 0.025):
        lr.fill_(rate)
        graph.replay()
        eager.step(op, lr_tensor=lr)
    assert_same(eager, graphed)


def test_tasks_past_one_launch():
    cases = [Case(kind=kind, shape=(3, 4)) for kind in (DENSE, ROWS, COLUMNS, ELEMENTS, TWO_FOUR) for _ in range(150)]
    check_step(op, cases, "cuda", steps=2)


def test_streams_do_not_disturb_each_other():
    serial = [make_problem(kinds(torch.bfloat16), "cuda", seed=s) for s in range(4)]
    parallel = [problem.clone() for problem in serial]
    streams = [torch.cuda.Stream() for _ in parallel]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        for problem, stream in zip(parallel, streams, strict=True):
            with torch.cuda.stream(stream):
                problem.step(op)
    torch.cuda.synchronize()
    for first, second in zip(serial, parallel, strict=True):
        for _ in range(20):
            first.step(op)
        assert_same(first, second)


def test_parameters_without_active_entries():
    none = [Case(kind=kind, shape=(8, 12), density=0.0) for kind in (ROWS, COLUMNS, ELEMENTS)] + [Case(shape=(0, 3))]
    check_step(op, [], "cuda")
    check_step(op, [*none, Case(), *none], "cuda")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device_while_the_first_is_current():
    check_step(op, kinds(), "cuda:1")
    assert torch.cuda.current_device() == 0
