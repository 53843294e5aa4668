"""Where the sections of a state buffer lie, and that the C++ sources read the table of layout.py."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_cl import layout as table
from sparse_cl import ops, reference
from sparse_cl.layout import (
    ALIGNMENT,
    BLOCK,
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

CSRC = Path(__file__).parents[1] / "csrc"
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
    ).by_rows(draw(st.booleans()))


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
    rows = layout.compact_shape[:1] if layout.by_row else ()
    assert views["exp_avg_sq"].shape == ((*rows, 1) if layout.by_row else layout.compact_shape)


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
        (COLUMNS, (4, 4), 4, {"by_row": True}),
        (DENSE, (4, 4, 4), 64, {"by_row": True}),
        (DENSE, (4,), 4, {"by_row": True}),
        (DENSE, (4, 4), 16, {"by_row": True, "amsgrad": True}),
    ],
)
def test_impossible_layouts_are_known(kind, shape, units, options):
    assert not StateLayout(kind, shape, units, torch.float32, **options).is_valid()


def camel(name):
    return "k" + "".join(word.capitalize() for word in name.lower().split("_"))


def by_value(*names):
    """Names of constants of layout.py as C++ spells them, in the order of their values, which must count from 0."""
    ordered = sorted(names, key=lambda name: getattr(table, name))
    assert [getattr(table, name) for name in ordered] == list(range(len(names)))
    return [camel(name) for name in ordered]


def field_names():
    shorter = {"cohort_scope": "scope"}
    return ["kField" + camel(shorter.get(f, f.removesuffix("_offset")))[1:] for f in FIELDS] + ["kFields"]


@pytest.mark.parametrize(
    "file, enum, expected",
    [
        ("layout_args.h", "enum Field", field_names()),
        ("masked_adamw.h", "enum class Kind : uint8_t", by_value("DENSE", "ROWS", "COLUMNS", "ELEMENTS", "TWO_FOUR")),
        ("masked_adamw.h", "enum class Scope : uint8_t", by_value("SHARED", "PER_UNIT", "PER_ENTRY")),
    ],
)
def test_the_enums_of_the_kernels_follow_the_table(file, enum, expected):
    found = re.search(re.escape(enum) + r" \{([^}]*)\}", (CSRC / file).read_text())
    names = re.findall(r"\w+", found.group(1)) if found else []
    assert names == expected, f"csrc/{file} must say, as sparse_cl/layout.py does: {enum} {{{', '.join(expected)}}};"


@pytest.mark.parametrize(
    "constant, value", [("kBlock", BLOCK), ("kOffsetUnit", ALIGNMENT), ("kMaxCohorts", MAX_COHORTS)]
)
def test_the_constants_of_the_kernels_are_those_of_the_table(constant, value):
    line = f"constexpr int64_t {constant} = {value};"
    assert line in (CSRC / "masked_adamw.h").read_text(), f"csrc/masked_adamw.h must say, as layout.py does: {line}"


def refusal(op, layout, param_dtype):
    """Why a step of a parameter of this layout is refused; None if it is not. Nothing is ever written."""
    param = torch.zeros(layout.shape, dtype=param_dtype)
    state = torch.zeros(max(layout.nbytes, 0), dtype=torch.uint8)
    rows = torch.tensor([layout.row()])
    try:
        grad = torch.zeros(layout.grad_shape, dtype=param_dtype)
        op([param], [grad], [state], [], rows, 0.1, None, 0.9, 0.999, 1e-8, 0.0, False, None, torch.ones(()))
    except RuntimeError as error:
        return str(error)


@pytest.mark.skipif(not ops.LOADED["cpu"], reason="no native library was built")
@given(data=st.data())
def test_native_code_and_the_table_allow_the_same(data):
    """One fact of a possible layout is replaced: both allow what is left, or neither does."""
    layout = data.draw(layouts())
    facts = {
        "kind": st.integers(-1, 5),
        "units": st.integers(0, 50),
        "cohorts": st.sampled_from((0, 1, 2, MAX_COHORTS, MAX_COHORTS + 1)),
        "cohort_scope": st.integers(-1, 3),
        "compact_grad": st.booleans(),
        "by_row": st.booleans(),
        "shape": st.lists(st.integers(0, 9), min_size=2, max_size=3).map(tuple),
    }
    name = data.draw(st.sampled_from(sorted(facts)))
    changed = replace(layout, **{name: data.draw(facts[name])})
    param_dtype = torch.float64 if changed.dtype == torch.float64 else torch.float32
    for op in (ops.masked_adamw_, reference.masked_adamw_):
        assert (refusal(op, changed, param_dtype) is None) == changed.is_valid()
