"""Optimizers that confine each update to the room that is free."""

from sparse_cl.optim.sparse_masked_adamw import SparseMaskedAdamW

__all__ = ["SparseMaskedAdamW"]
