"""A linear layer that learns some of its rows or columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sparse_cl.layout import is_sharded, part, state_dtype, whole
from sparse_cl.masks import ColumnMask, Mask, RowMask
from sparse_cl.optim.leaf import owner_of, set_owner
from sparse_cl.optim.shards import piece_of
from sparse_cl.optim.whole_state import blocks_of


class _LinearOfActive(torch.autograd.Function):
    """y = x Wᵀ + b of (t, n) inputs, with gradients for x and for ``active``.

    ``active`` stands for the rows ``index`` of W; or, where ``columns_of_x`` is given, for columns, whose part of x
    this is, an argument of its own so that gradients of gradients pass through it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        active: Tensor,
        index: Tensor,
        columns_of_x: Tensor | None,
    ) -> Tensor:
        kept = None
        ctx.rowwise = columns_of_x is None
        if ctx.needs_input_grad[3]:
            kept = x if ctx.rowwise else columns_of_x
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, kept, active, index)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, active, index = ctx.saved_tensors
        grad_x = grad_active = None
        if weight is not None:
            # Of W, whose active part stands for ``active``: gradients of this gradient have to know.
            again = torch.is_grad_enabled() and kept is not None
            grad_x = _OfInput.apply(grad, weight, active, index, ctx.rowwise) if again else grad.mm(weight)
        if kept is not None:
            of_active = grad.index_select(1, index) if ctx.rowwise else grad
            grad_active = _product(of_active.t(), kept, active.dtype)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_active, None, None


class _OfInput(torch.autograd.Function):
    """The gradient G W of a linear layer's inputs, (t, n), once differentiable in G and in ``active``."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, active: Tensor, index: Tensor, rowwise: bool) -> Tensor:
        ctx.save_for_backward(grad, weight, index)
        ctx.rowwise, ctx.leaf_dtype = rowwise, active.dtype
        return grad.mm(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight, index = ctx.saved_tensors
        if ctx.rowwise:
            grad_active = grad.index_select(1, index).t().mm(second)
        else:
            grad_active = grad.t().mm(second.index_select(1, index))
        return second.mm(weight.t()), None, grad_active.to(ctx.leaf_dtype), None, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in ``dtype``. A GPU sums half precision in float32 and need not round it between."""
    narrow = a.dtype in (torch.bfloat16, torch.float16)
    if a.is_cuda and narrow and dtype == torch.float32 and not torch.is_grad_enabled():
        return torch.mm(a, b, out_dtype=dtype)
    return a.mm(b).to(dtype)


class ActiveLinear(nn.Linear):
    """An ``nn.Linear`` that learns only some rows or columns of its weight.

    The forward pass uses all of W. The backward pass gives the input's gradient in full, and the weight's gradient of
    the active part only, to the leaf ``active``; the whole weight gradient never exists. ``weight`` and ``bias`` stay
    frozen parameters; ``bias.requires_grad_(True)`` trains the whole bias. With active columns, the backward pass keeps
    only those columns of the input.

    :class:`~sparse_cl.SparseMaskedAdamW` and :class:`~sparse_cl.SubspaceProjectedAdamW` step the leaf and write the
    rounded values into W in the same kernel, scaled by the mask's gain if it has one; the leaf is then the only master
    copy of the active entries. After a step of another optimizer call :func:`~sparse_cl.nn.write_back`.

    ``state_dict`` has the keys of an ``nn.Linear``. Loading one sets the leaf to the loaded weight; where the leaf
    already rounds to it, it keeps its further digits. As in any model whose inputs need no gradient, reentrant
    checkpointing reaches no layer unless the inputs require one (``model.enable_input_require_grads()``).

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        mask: the active rows or columns of the (out_features, in_features) weight.
        leaf_dtype: dtype of the leaf: float32, float64 for a float64 weight, or the weight's. In half precision the
            leaf is only where the gradient goes, and the optimizer keeps the master copy, or rounds stochastically.

    Attributes:
        active: the leaf, (k, in_features) for k rows, (out_features, k) for k columns.
        mask: as given, on the weight's device.

    FSDP2's ``fully_shard`` may split the layer, with the model around it.

    Raises:
        TypeError, ValueError: no row or column mask, one of another shape, one without entries, another leaf dtype.
    """

    _split = False  # fully_shard has split it over processes

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: RowMask | ColumnMask,
        leaf_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        check_mask(mask, self.weight, "the weight")
        if mask.numel == 0:
            raise ValueError(f"mask: expected an active row or column, got {mask!r}; use nn.Linear, frozen")
        self._begin(mask, leaf_dtype_for(self.weight, leaf_dtype, "the weight"))
        self.frozen_by_activate = [name for name, _ in nn.Linear.named_parameters(self) if name != "active"]
        for name in self.frozen_by_activate:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        learning = torch.is_grad_enabled()
        if is_sharded(weight):
            raise RuntimeError(
                "the weight of an ActiveLinear is split over processes in its forward pass, as tensor parallelism has "
                "it; expected it whole, as fully_shard gathers it. Give its mask to SparseMaskedAdamW(masks=...) "
                "instead"
            )
        if learning and weight.requires_grad:
            raise RuntimeError(
                "the weight of an ActiveLinear requires a gradient, which it does not compute; freeze it "
                "(weight.requires_grad_(False)), or call sparse_cl.nn.restore(model) to train all of it"
            )
        if self._index.device != weight.device:
            self._place(self.mask)  # fully_shard moves parameters without telling their modules
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input, weight = _autocast(input, dtype), _autocast(weight, dtype)
            bias = None if bias is None else _autocast(bias, dtype)
        # Flat, since the output of a linear layer of more dimensions is a view, and the views that a Function returns
        # may not be written to, as an activation in place does.
        flat = input.reshape(-1, input.shape[-1])
        columns_of_x = None
        if self._dim == 1 and learning and self.active.requires_grad:
            columns_of_x = flat.index_select(1, self._index)
        output = _LinearOfActive.apply(flat, weight, bias, self.active, self._index, columns_of_x)
        return output if input.dim() == 2 else output.reshape(*input.shape[:-1], output.shape[-1])

    @torch.no_grad()
    def write_back(self) -> None:
        """Writes the leaf, rounded, into the weight.

        Where FSDP2 has split them, each process writes its part of the weight, and all must call it: the rows of a leaf
        of rows are gathered, as they lie with other processes than those of the weight.

        Raises:
            RuntimeError: FSDP2 has gathered the layer.
        """
        self._refuse_gathered()
        piece = piece_of(self.weight)
        if piece is None:
            self.weight.index_copy_(self._dim, self._index.long(), whole(self.active).to(self.weight.dtype))
            return
        index = self.mask.piece(piece.offset, piece.size).index
        if self._dim == 1 and is_sharded(self.active) and piece.has_rows:
            values = part(self.active)  # split as the weight is
        else:
            ((offset, size),) = blocks_of(self.mask, piece)
            values = whole(self.active)[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
        weight = part(self.weight)
        weight.index_copy_(self._dim, index.long().to(weight.device), values.to(weight.dtype))

    @torch.no_grad()
    def refresh(self) -> None:
        """Sets the leaf to the weight, where it does not round to that already; of split ones all must call it.

        Raises:
            RuntimeError: FSDP2 has gathered the layer.
        """
        self._refuse_gathered()
        weight, active, piece = whole(self.weight), whole(self.active), piece_of(self.active)
        values = weight.index_select(self._dim, self._index.to(weight.device))
        changed = active.to(values.dtype) != values
        active = torch.where(changed, values.to(active.dtype), active)
        if piece is not None:
            active = active[tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.size, strict=True))]
        part(self.active).copy_(active)

    def _refuse_gathered(self) -> None:
        if self._split and not is_sharded(self.active):
            raise RuntimeError(
                "an ActiveLinear is gathered by fully_shard, as after a pass without gradients, so that what is "
                "written would be lost; call model.reshard() first"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask={self.mask!r}"

    # A linear layer becomes one of these, and back, in place, so references to the module stay valid.

    def _begin(self, mask: RowMask | ColumnMask, leaf_dtype: torch.dtype) -> None:
        self._place(mask)
        values = self.weight.detach().index_select(self._dim, self._index)
        self.active = nn.Parameter(values.to(leaf_dtype))

    def _end(self) -> None:
        self.write_back()
        del self.active, self.mask, self._index, self._dim
        self.__dict__.pop("_split", None)
        self.__class__ = nn.Linear  # type: ignore[assignment]  # the way back of activate()

    def _place(self, mask: RowMask | ColumnMask) -> None:
        moved = mask.to(self.weight.device)
        assert isinstance(moved, RowMask | ColumnMask)
        self.mask: RowMask | ColumnMask = moved
        self._index = self.mask.index
        self._dim = 0 if isinstance(mask, RowMask) else 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActiveLinear:
        super()._apply(fn, recurse)
        self._place(self.mask)
        set_owner(self.active, self)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # fully_shard puts a split leaf in the place of the first, and while it has gathered the layer a whole one.
        if name == "active" and isinstance(value, Tensor):
            set_owner(value, self)
            self._split = self._split or is_sharded(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A shallow copy shares its leaf with the layer that it was made of.
        if owner_of(self.active) is None:
            set_owner(self.active, self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}active", None)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        leaf = self._parameters.pop("active")
        try:
            super()._load_from_state_dict(state_dict, prefix, *arguments)
        finally:
            self._parameters["active"] = leaf
        if f"{prefix}weight" in state_dict:
            self.refresh()


def check_mask(mask: Mask, weight: Tensor, name: str) -> None:
    """Raises an error that names ``weight`` if it cannot be trained in part as ``mask`` says."""
    if not isinstance(mask, RowMask | ColumnMask):
        hint = "; use SparseMaskedAdamW(masks=...) for masks of single weights" if isinstance(mask, Mask) else ""
        raise TypeError(f"{name}: expected a RowMask or a ColumnMask, got {type(mask).__name__}{hint}")
    if mask.shape != weight.shape:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, but its mask is for {tuple(mask.shape)}")


def leaf_dtype_for(weight: Tensor, asked: torch.dtype | None, name: str) -> torch.dtype:
    """The dtype of the leaf of ``weight``."""
    allowed = {state_dtype(weight.dtype), weight.dtype}
    if asked is None:
        return state_dtype(weight.dtype)
    if asked not in allowed:
        raise ValueError(
            f"leaf_dtype: {name} is {weight.dtype}, so expected {' or '.join(sorted(map(str, allowed)))}, got {asked}"
        )
    return asked


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast gives a tensor to ``nn.Linear``: float64 is left alone."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
