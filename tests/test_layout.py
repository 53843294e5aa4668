"""Where the sections of a state buffer lie."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl.layout import (
    ALIGNMENT,
    COLUMNS,
    DENSE,
    ELEMENTS,
    FIELDS,
    INDEX_NAME,
    MAX_COHORTS,
    PER_ENTRY,
    PER_UNIT,
    ROWS,
    SHARED,
    TWO_FOUR,
    StateLayout,
    state_dtype,
)

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def layouts(draw):
    kind = draw(st.sampled_from((DENSE, ROWS, COLUMNS, ELEMENTS, TWO_FOUR)))
    shape = (draw(st.integers(0, 40)), 4 * draw(st.integers(0, 12)))
    if kind in (DENSE, ELEMENTS, ROWS) and draw(st.booleans()):
        shape = (*shape, draw(st.integers(0, 3)))
    most = {ROWS: shape[0], COLUMNS: shape[1], ELEMENTS: math.prod(shape)}
    units = draw(st.integers(0, most[kind])) if kind in most else math.prod(shape) // (2 if kind == TWO_FOUR else 1)
    by_unit = kind in (ROWS, COLUMNS)
    return StateLayout(
        kind,
        shape,
        units,
        state_dtype(draw(st.sampled_from(PARAM_DTYPES))),
        gain=by_unit and draw(st.booleans()),
        amsgrad=draw(st.booleans()),
        master=draw(st.booleans()),
        cohorts=draw(st.integers(1, MAX_COHORTS)),
        cohort_scope=draw(st.sampled_from((SHARED, PER_UNIT, PER_ENTRY) if by_unit else (SHARED, PER_ENTRY))),
        seed=draw(st.integers(0, 2**31)),
        compact_grad=by_unit and draw(st.booleans()),
    )


@given(layouts())
def test_sections_are_aligned_and_apart_and_fill_the_buffer(layout):
    end = 0
    for offset, shape, dtype in layout.sections().values():
        assert offset % ALIGNMENT == 0
        assert offset >= end
        end = offset + math.prod(shape) * dtype.itemsize
    assert end == layout.nbytes
    assert layout.is_valid()


@given(layouts())
def test_a_row_gives_the_layout_back(layout):
    row = layout.row()
    assert len(row) == len(FIELDS)
    param_dtype = torch.float64 if layout.dtype == torch.float64 else torch.bfloat16
    assert StateLayout.from_row(row, layout.shape, param_dtype) == layout


@given(layouts())
def test_views_share_the_buffer_each_for_itself(layout):
    buffer, views = layout.allocate(torch.device("cpu"))
    assert buffer.dtype == torch.uint8
    assert buffer.numel() == layout.nbytes
    expected = {INDEX_NAME[layout.kind] if name == "index" else name for name in layout.sections()}
    assert views.keys() == expected
    for number, view in enumerate(views.values(), start=1):
        assert not view.any()
        view.fill_(number)
    for number, view in enumerate(layout.views(buffer).values(), start=1):
        assert (view == number).all()
    assert views["exp_avg"].dtype == layout.dtype
    assert views["exp_avg"].shape == layout.compact_shape
    assert views["exp_avg"].numel() == layout.entries


@pytest.mark.parametrize(
    "kind, shape, units, compact",
    [
        (DENSE, (), 1, ()),
        (DENSE, (3, 4, 5), 60, (3, 4, 5)),
        (ROWS, (7,), 2, (2,)),
        (ROWS, (7, 3, 3, 3), 2, (2, 3, 3, 3)),
        (COLUMNS, (7, 9), 2, (7, 2)),
        (ELEMENTS, (7, 9), 5, (5,)),
        (TWO_FOUR, (7, 12), 42, (7, 6)),
    ],
)
def test_compact_shapes(kind, shape, units, compact):
    layout = StateLayout(kind, shape, units, torch.float32)
    assert layout.compact_shape == compact
    assert layout.is_valid()


@pytest.mark.parametrize(
    "kind, shape, units, options",
    [
        (5, (4, 4), 1, {}),
        (-1, (4, 4), 1, {}),
        (ROWS, (), 1, {}),
        (ROWS, (4, 4), 5, {}),
        (ROWS, (4, 4), -1, {}),
        (COLUMNS, (4,), 1, {}),
        (COLUMNS, (4, 4), 5, {}),
        (ELEMENTS, (4, 4), 17, {}),
        (TWO_FOUR, (4, 6), 12, {}),
        (TWO_FOUR, (8,), 4, {}),
        (DENSE, (4, 4), 16, {"cohorts": 0}),
        (DENSE, (4, 4), 16, {"cohorts": MAX_COHORTS + 1}),
        (DENSE, (4, 4), 16, {"cohort_scope": PER_UNIT}),
        (ELEMENTS, (4, 4), 4, {"cohort_scope": PER_UNIT}),
        (ROWS, (4, 4), 4, {"cohort_scope": 3}),
    ],
)
def test_impossible_layouts_are_known(kind, shape, units, options):
    assert not StateLayout(kind, shape, units, torch.float32, **options).is_valid()
