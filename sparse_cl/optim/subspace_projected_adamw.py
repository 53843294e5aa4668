"""AdamW whose updates stay orthogonal to the subspaces that earlier domains use."""

from __future__ import annotations

from .low_rank import LowRankProjection, SubspaceProjection
from .memory_adamw import Known, MemoryAdamW


class SubspaceProjectedAdamW(MemoryAdamW):
    """:class:`ProjectedAdamW` whose updates ΔW (m, n) satisfy ΔW U = 0 for given bases U (n, r).

    What is projected is AdamW's full update, weight decay included, of the float32 master. A parameter without a basis
    is stepped as by :class:`SparseMaskedAdamW`.

    With a row mask the compact rows are projected. With a column mask of columns C they are projected out of the range
    of the rows C of U; if there are as many used directions as columns, nothing is free. With element and 2:4 masks
    what is masked stays bit-identical, and each step takes back what the mask lets it of all that the weight has moved
    inside: that has no bound.

    The bound ‖ΔW U‖²_F ≤ 1e-6 ‖ΔW‖²_F holds for float32 parameters, and for the masters of bfloat16 and float16 ones;
    rounding such a master to its parameter adds to the parameter's own leak, and without masters there is no bound.
    Products are made in float32, whatever the caller allows elsewhere.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, capturable, masks, master_weights: as for
            :class:`SparseMaskedAdamW`.
        memory: a :class:`SubspaceMemory`, whose bases are followed as they grow; or ``{parameter or its name: Subspace
            or an orthonormal (n, r) tensor}``.
        rest: what happens to parameters that the memory does not protect, once there is any basis: biases, norms,
            embeddings, and what it never saw, which a warning names. ``"freeze"``, as GPM does, or ``"train"``, and
            then of an embedding those rows alone that no earlier domain looked up. An unprotected residual path undoes
            the protection of the rest. Of a mapping, those of fewer than two dimensions.

        every: k above 1: steps are plain, and after every k-th the weights are corrected for all that they have moved
            since the domain began. It costs a k-th, and W₀ U (m, r) is kept of each weight. Steps after the last k-th
            stay uncorrected. Not with masks of single weights, nor in a CUDA graph.

    Raises:
        TypeError, ValueError: as there; a basis that fits no parameter, is not orthonormal, has another width or
            device; a memory of another model.
    """

    def _projection(self, known: Known) -> LowRankProjection:
        projection = SubspaceProjection(known.subspace, transposed=known.transposed)
        return projection if known.rows is None else projection.with_rows(known.rows)
