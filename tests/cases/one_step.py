"""One step of whichever sparse_cl is imported; prints what ran it, whether anything was built, and the public names.

``make wheel`` runs it in a fresh environment with the argument ``native``: then the libraries must have run it.
"""

import sys

import torch

import sparse_cl
from sparse_cl import *  # noqa: F403
from sparse_cl import RowMask, SparseMaskedAdamW, build_info

p = torch.nn.Parameter(torch.ones(4, 4))
opt = SparseMaskedAdamW([p], masks={p: RowMask([1], (4, 4))})
p.grad = torch.ones(4, 4)
opt.step()
assert (p != 1).any(1).tolist() == [False, True, False, False]
info = build_info()
assert "native" not in sys.argv or (info["runs"]["cpu"] == "native" and info["cpu_levels"]), info
print(info["runs"]["cpu"], info["cpu_levels"] is not None, *sorted(sparse_cl.__all__), sep="\n")
