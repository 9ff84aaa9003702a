"""When a fused kernel stands in for its torch reference: on a GPU with Triton, where no gradient is wanted and nothing is being traced.

Everywhere else the reference runs, so that gradients, compilation and CPUs see plain torch. The choice is by what there is, never by trying.
"""

from __future__ import annotations

import torch

from .triton_available import fused

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unrecorded(*tensors: torch.Tensor | None) -> bool:
    """Whether an operation on these tensors may work in place and through kernels that know no gradient."""
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)


def fuses(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the fused kernel serves `x` and the `others` that it is computed with; all of one dtype, so that nothing would be promoted."""
    alike = all(t is None or t.dtype == x.dtype for t in others)
    return fused(x) and alike and x.dtype in DTYPES and x.numel() > 0 and unrecorded(x, *others)
