"""Masks: what may be built, set algebra, files."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from sparse_cl import ColumnMask, ElementMask, RowMask, TwoFourMask, load_masks, save_masks

KINDS = ("rows", "columns", "elements", "two_four")


def two_four(shape, seed=0):
    """A random dense 2:4 pattern."""
    scores = torch.rand(shape[0], shape[1] // 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(2).indices, True).view(shape)


@st.composite
def dense_masks(draw, kind=None, shape=None):
    """A mask and the dense bool tensor that it must equal."""
    kind = kind or draw(st.sampled_from(KINDS))
    m, n = shape or (draw(st.integers(0, 5)), 4 * draw(st.integers(0, 4)))
    dense = torch.zeros(m, n, dtype=torch.bool)
    if kind == "rows":
        rows = draw(st.permutations(range(m)))[: draw(st.integers(0, m))]
        dense[rows] = True
        return RowMask(rows, (m, n)), dense
    if kind == "columns":
        columns = draw(st.permutations(range(n)))[: draw(st.integers(0, n))]
        dense[:, columns] = True
        return ColumnMask(columns, (m, n)), dense
    if kind == "elements":
        dense = torch.rand(m, n, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.5
        return ElementMask(dense), dense
    dense = two_four((m, n), draw(st.integers(0, 99)))
    return TwoFourMask(dense), dense


@given(dense_masks(), st.data())
def test_a_piece_is_a_block_of_the_dense_tensor(drawn, data):
    mask, dense = drawn
    (top, bottom), (left, right) = (sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in dense.shape)
    if isinstance(mask, TwoFourMask) and (left % 4 or right % 4):
        with pytest.raises(ValueError, match=f"of which columns {left} to {right - 1} are no whole number"):
            mask.piece((top, left), (bottom - top, right - left))
        return
    piece = mask.piece((top, left), (bottom - top, right - left))
    assert type(piece) is type(mask)
    assert torch.equal(piece.to_dense(), dense[top:bottom, left:right])


def test_a_piece_keeps_the_gains_of_its_rows():
    mask = RowMask([5, 1, 3], (8, 4), gain=[5.0, 1.0, 3.0])
    assert mask.piece((2, 0), (4, 4)) == RowMask([1, 3], (4, 4), gain=[3.0, 5.0])


@given(dense_masks())
def test_a_mask_is_its_dense_tensor(drawn):
    mask, dense = drawn
    assert torch.equal(mask.to_dense(), dense)
    assert mask.shape == dense.shape
    assert mask.numel == int(dense.sum())
    assert mask.density == (dense.double().mean().item() if dense.numel() else 0.0)
    assert torch.equal(mask.positions(), dense.view(-1).nonzero().view(-1))
    assert mask.to("cpu") is mask
    assert mask == copy.deepcopy(mask) == pickle.loads(pickle.dumps(mask))
    assert f"{mask.numel} of {dense.numel()}" in repr(mask)


@given(st.data())
def test_set_algebra_is_that_of_dense_masks(data):
    shape = data.draw(st.tuples(st.integers(0, 4), st.sampled_from((0, 4, 12))))
    (a, dense_a), (b, dense_b) = (data.draw(dense_masks(shape=shape)) for _ in range(2))
    assert torch.equal((a | b).to_dense(), dense_a | dense_b)
    assert torch.equal((a & b).to_dense(), dense_a & dense_b)
    assert torch.equal((~a).to_dense(), ~dense_a)
    assert ~~a == a
    assert (a | a).to_dense().equal(dense_a)
    if type(a) is type(b) and not isinstance(a, TwoFourMask):
        assert type(a | b) is type(a & b) is type(~a) is type(a)
    else:
        assert isinstance(a | b, ElementMask)
        assert isinstance(a & b, ElementMask)


def test_other_dimensions():
    assert RowMask([1], (3,)).to_dense().tolist() == [False, True, False]
    assert RowMask([2], (3, 2, 2)).numel == 4
    dense = torch.rand(3, 5, 7) < 0.3
    assert torch.equal(ElementMask(dense).to_dense(), dense)
    assert ElementMask(torch.tensor(True)).numel == 1


@pytest.mark.parametrize("cls", [RowMask, ColumnMask])
def test_gains_follow_their_units_through_set_algebra(cls):
    a = cls([5, 1, 3], (6, 6), gain=[0.5, 0.25, 2.0])
    b = cls([3, 4], (6, 6), gain=[3.0, 0.125])
    plain = cls([0, 1], (6, 6))
    assert a.gain.tolist() == [0.25, 2.0, 0.5]  # sorted with the indices 1, 3, 5
    assert (a | b).index.tolist() == [1, 3, 4, 5]
    assert (a | b).gain.tolist() == [0.25, 3.0, 0.125, 0.5]
    assert (a & b).index.tolist() == [3]
    assert (a & b).gain.tolist() == [6.0]
    assert (a | plain).gain.tolist() == [1.0, 1.0, 2.0, 0.5]
    assert (plain & a).gain.tolist() == [0.25]
    assert (~a).gain is None
    assert a != cls([5, 1, 3], (6, 6))
    assert a == cls([1, 3, 5], (6, 6), gain=[0.25, 2.0, 0.5])
    with pytest.raises(ValueError, match="would lose their gain"):
        a | ElementMask(torch.ones(6, 6, dtype=torch.bool))


def test_a_mask_does_not_share_memory_with_its_arguments():
    rows, dense = torch.tensor([0, 2], dtype=torch.int32), torch.ones(3, 4, dtype=torch.bool)
    gain = torch.tensor([1.0, 2.0], requires_grad=True)
    row_mask, element_mask = RowMask(rows, (3, 4), gain=gain), ElementMask(dense)
    rows.zero_()
    dense.zero_()
    with torch.no_grad():
        gain.zero_()
    assert row_mask.index.tolist() == [0, 2]
    assert row_mask.gain.tolist() == [1.0, 2.0]
    assert not row_mask.gain.requires_grad
    assert element_mask.numel == 12


def test_equality_is_by_value_and_kind():
    dense = torch.zeros(4, 4, dtype=torch.bool)
    dense[1] = True
    assert RowMask([1], (4, 4)) == RowMask(torch.tensor([1], dtype=torch.uint8), (4, 4))
    assert RowMask([1], (4, 4)) != RowMask([2], (4, 4))
    assert RowMask([1], (4, 4)) != RowMask([1], (4, 8))
    assert RowMask([1], (4, 4)) != ColumnMask([1], (4, 4))
    assert RowMask([1], (4, 4)) != ElementMask(dense)
    assert RowMask([1], (4, 4)) != "rows"
    with pytest.raises(TypeError, match="unhashable"):
        hash(RowMask([1], (4, 4)))


@pytest.mark.parametrize("cls, name", [(RowMask, "rows"), (ColumnMask, "columns")])
@pytest.mark.parametrize(
    "units, options, error, message",
    [
        ([4], {}, IndexError, "{}: index 4 is out of range for shape (4, 4): expected 0 to 3"),
        ([0, -1], {}, IndexError, "{}: index -1 is out of range"),
        ([1, 2, 1], {}, ValueError, "{}: index 1 is given twice"),
        ([0.0, 1.0], {}, TypeError, "{}: expected integer indices, got torch.float32"),
        (torch.tensor([True, False, True, False]), {}, TypeError, "use .nonzero().flatten() on a bool vector"),
        (torch.zeros(2, 2, dtype=torch.long), {}, ValueError, "{}: expected one index a "),
        (1, {}, ValueError, "{}: expected one index a "),
        ([1, 2], {"gain": [1.0]}, ValueError, "gain: expected 2 factors"),
        ([1, 2], {"gain": [1.0, 0.0]}, ValueError, "gain: expected finite factors above 0"),
        ([1, 2], {"gain": [1.0, -1.0]}, ValueError, "gain: expected finite factors above 0"),
        ([1, 2], {"gain": [1.0, float("nan")]}, ValueError, "gain: expected finite factors above 0"),
        ([1, 2], {"gain": [1.0, float("inf")]}, ValueError, "gain: expected finite factors above 0"),
    ],
)
def test_wrong_units_are_refused(cls, name, units, options, error, message):
    with pytest.raises(error) as caught:
        cls(units, (4, 4), **options)
    assert message.format(name) in str(caught.value)


@pytest.mark.parametrize("cls, shape", [(RowMask, ()), (ColumnMask, (4,)), (ColumnMask, (4, 4, 4))])
def test_wrong_dimensions_are_refused(cls, shape):
    with pytest.raises(ValueError, match=f"a {cls.__name__} needs"):
        cls([0], shape)


def test_wrong_dense_masks_are_refused():
    for cls in (ElementMask, TwoFourMask):
        for wrong in (torch.ones(4, 4), torch.ones(4, 4, dtype=torch.uint8), [[True]]):
            with pytest.raises(TypeError, match="dense_bool: expected a bool tensor"):
                cls(wrong)
    for shape in ((8,), (4, 6), (2, 4, 4)):
        with pytest.raises(ValueError, match="n a multiple of 4"):
            TwoFourMask(torch.zeros(shape, dtype=torch.bool))
    three = two_four((3, 8))
    three[1, 4:] = torch.tensor([True, True, False, True])
    with pytest.raises(ValueError, match="exactly 2 active of each 4 along dim 1, got 3 at row 1, columns 4 to 7"):
        TwoFourMask(three)


def test_masks_of_other_shapes_do_not_combine():
    with pytest.raises(ValueError, match=r"shapes \(4, 4\) and \(4, 8\)"):
        RowMask([1], (4, 4)) | RowMask([1], (4, 8))
    with pytest.raises(ValueError, match=r"shapes \(4, 4\) and \(4, 8\)"):
        RowMask([1], (4, 4)) & ColumnMask([1], (4, 8))
    with pytest.raises(TypeError):
        RowMask([1], (4, 4)) | torch.ones(4, 4, dtype=torch.bool)


def examples():
    return {
        "layers.0.up": RowMask([3, 1], (4, 6), gain=[0.1, 3.0]),
        "layers.0.down": ColumnMask([5, 0, 2], (4, 6)),
        "columns with gain": ColumnMask([5, 0, 2], (4, 6), gain=[1.5, 0.7, 1e-6]),
        "conv": RowMask([1], (2, 3, 3, 3)),
        "any:thing": ElementMask(torch.rand(7, 11, generator=torch.Generator().manual_seed(0)) < 0.3),
        "2:4": TwoFourMask(two_four((5, 12))),
        "none": RowMask([], (4, 4)),
        "no elements": ElementMask(torch.zeros(0, 4, dtype=torch.bool)),
    }


@pytest.fixture
def mask_file(tmp_path):
    save_masks(examples(), tmp_path / "masks.safetensors")
    return tmp_path / "masks.safetensors"


def test_files_give_back_equal_masks(mask_file, tmp_path):
    loaded = load_masks(mask_file)
    assert list(loaded) == list(examples())
    for name, mask in examples().items():
        assert type(loaded[name]) is type(mask)
        assert loaded[name] == mask
        assert loaded[name].numel == mask.numel
    assert loaded["layers.0.up"].gain.tolist() == examples()["layers.0.up"].gain.tolist()
    save_masks({}, tmp_path / "empty")
    assert load_masks(str(tmp_path / "empty")) == {}


def test_only_named_masks_are_saved(tmp_path):
    for wrong in ({0: RowMask([1], (2, 2))}, {"a": torch.ones(2, dtype=torch.bool)}):
        with pytest.raises(TypeError, match="expected {name: mask}"):
            save_masks(wrong, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_truncated_and_foreign_files_are_refused(mask_file, tmp_path):
    content = mask_file.read_bytes()
    for size in (0, 4, 100, len(content) // 2, len(content) - 1):
        mask_file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="masks.safetensors: not a readable masks file"):
            load_masks(mask_file)
    mask_file.write_bytes(b"PK\x03\x04" + content[4:])
    with pytest.raises(ValueError, match="not a readable masks file"):
        load_masks(mask_file)
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: holds no masks of sparse_cl"):
        load_masks(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        load_masks(tmp_path / "absent")


def rewrite(path, edit):
    """Lets ``edit`` change the tensors, the index and the metadata of a mask file."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    index = json.loads(metadata["masks"])
    edit(tensors, index, metadata)
    save_file(tensors, path, metadata={"masks": json.dumps(index), **{k: metadata[k] for k in ("format", "version")}})


def swap(key, value):
    return lambda tensors, index, metadata: tensors.__setitem__(key, torch.as_tensor(value))


@pytest.mark.parametrize(
    "edit",
    [
        swap("layers.0.up:rows", [1, 9]),
        swap("layers.0.up:rows", [1, -1]),
        swap("layers.0.up:rows", [1, 1]),
        swap("layers.0.up:rows", [1.0, 3.0]),
        swap("layers.0.up:rows", [[1, 3]]),
        swap("layers.0.up:gain", [1.0, 0.0]),
        swap("layers.0.up:gain", [1.0]),
        swap("any:thing:bits", [1]),
        swap("any:thing:bits", [1.0, 2.0, 3.0]),
        swap("2:4:two_four_bits", torch.tensor([7, 7], dtype=torch.int32)),
        lambda tensors, index, metadata: tensors.pop("layers.0.down:columns"),
        lambda tensors, index, metadata: index["layers.0.down"].__setitem__("shape", [4, 5]),
        lambda tensors, index, metadata: index["any:thing"].__setitem__("shape", [-7, -11]),
        lambda tensors, index, metadata: index["conv"].__setitem__("shape", "wide"),
        lambda tensors, index, metadata: index["conv"].__setitem__("kind", "DiagonalMask"),
        lambda tensors, index, metadata: index.__setitem__("conv", 3),
        lambda tensors, index, metadata: index.__setitem__("extra", index["conv"]),
    ],
)
def test_tampered_files_are_refused_by_name(mask_file, edit):
    rewrite(mask_file, edit)
    with pytest.raises(ValueError, match=r"masks\.safetensors: mask '[\w.: ]+' is damaged"):
        load_masks(mask_file)


def test_files_of_another_version_are_refused(mask_file):
    rewrite(mask_file, lambda tensors, index, metadata: metadata.__setitem__("version", "2"))
    with pytest.raises(ValueError, match="masks format version 2, but this sparse_cl reads 1"):
        load_masks(mask_file)
