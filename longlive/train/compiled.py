"""torch.compile where it pays: transformer blocks, and the norm and activation of the VAE.

Attention stays outside the graph. Blocks are compiled one by one (they share one graph); attention itself is a handful of library calls
per chunk and is left alone, except that the rotation before it, a chain of small elementwise passes, becomes a graph of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..cache.attend import TeacherForced
from ..models.wan_vae import channels_last as channels_last
from ..ops.frames import norm_silu
from ..ops.rope import apply_rope

GRAPHS = 64  # compiled variants per function; the default of 8 is fewer than the shapes of a run


def compile_blocks(blocks: Iterable[nn.Module], backend: str = "inductor") -> None:
    """Compiles every block in place. `layer` numbers and prompts' lengths may vary without compiling again.

    Of a recomputed block what is recomputed is compiled: compiled from outside it would run as written, since a graph cannot end (at
    attention) inside of a recomputation.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    for block in blocks:
        if isinstance(block.forward, Recomputed):
            block.forward.inner = torch.compile(block.forward.inner, backend=backend)
        else:
            block.compile(backend=backend)


def checkpoint_blocks(blocks: Sequence[nn.Module], keep: int = 0) -> None:
    """Recomputes the activations of every block but the last `keep` in the backward pass instead of keeping them."""
    for block in blocks[: max(0, len(blocks) - keep)]:
        block.forward = Recomputed(block.forward)


class Recomputed:
    """A forward whose activations are computed again for the backward pass; `inner` is the forward itself."""

    def __init__(self, inner: Callable):
        self.inner = inner

    def __call__(self, *args, **kwargs):
        return checkpoint(self.inner, *args, use_reentrant=False, **kwargs)


def compiled_pointwise(*, frozen: bool = False) -> Callable:
    """`wan_vae.norm_silu` as one graph per channel count, whatever the other sizes (each would otherwise compile for itself).

    A VAE that trains runs it as written where there are no gradients (statistics, validation): those few calls are not worth graphs of
    their own. A `frozen` one, which encodes thousands of clips, is compiled there too.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    fused = torch.compile(norm_silu)

    def pointwise(x_BTHWC: torch.Tensor, gamma: torch.Tensor, past_BPHWC: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
        if bias is not None or not (frozen or torch.is_grad_enabled()):  # a bias comes where a fused kernel takes it
            return norm_silu(x_BTHWC, gamma, past_BPHWC, bias)
        for tensor in (x_BTHWC,) if past_BPHWC is None else (x_BTHWC, past_BPHWC):
            for dim in range(4):
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
            torch._dynamo.mark_static(tensor, 4)
        return fused(x_BTHWC, gamma, past_BPHWC)

    return pointwise


class RotatedAhead:
    """A TeacherForced strategy whose rotation a compiler may fuse and whose attention it leaves alone."""

    def __init__(self, attend: TeacherForced):
        self.rope, attend.rope = attend.rope, None
        self.attend = attend

    def __call__(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None:
        if q is None or self.rope is None:
            return self._read(q, k, v, layer)
        return self._read(apply_rope(q, *self.rope), apply_rope(k, *self.rope), v, layer)

    @torch.compiler.disable
    def _read(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None:
        return self.attend(q, k, v, layer)
