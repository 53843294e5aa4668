"""Matrix products: how many there are, and as a GPU makes them in TF32."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
PRODUCTS = (ATEN.mm, ATEN.bmm, ATEN.addmm, ATEN.addmm_, ATEN.baddbmm_, ATEN.baddbmm)


class Products(TorchDispatchMode):
    """Counts matrix products; with ``mantissa``, rounds their float32 operands to so many bits, as TF32 does to 10."""

    def __init__(self, mantissa=None):
        super().__init__()
        self.count, self.mantissa = 0, mantissa

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            self.count += 1
            if self.mantissa is not None:
                args = (*args[:-2], *(rounded(operand, self.mantissa) for operand in args[-2:]))
        return func(*args, **(kwargs or {}))


def rounded(x, mantissa):
    if x.dtype != torch.float32:
        return x
    drop = 23 - mantissa
    whole = x.contiguous().view(torch.int32)
    return ((whole + (1 << (drop - 1))) >> drop << drop).view(torch.float32)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
