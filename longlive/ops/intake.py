"""What a layer wants to be handed: a plain tensor, or activations in a form of its own that their producer can make on the way.

A layer with an `intake` takes what `intake.of(x)` gives in place of x. Layers with equal intakes that read the same tensor share one such form; a producer
that writes rows (a norm, a GELU) can write the form instead. A layer with hooks is always handed plain tensors, since a hook reads its input (LoRA
branches do), and so is every layer where gradients are recorded or code is traced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from .fp4_matmul import quantised_activation
from .fp8 import RowFP8
from .fp8_matmul import quantised_rows
from .inference import fuses, unrecorded
from .nvfp4 import NVFP4


class Intake(Protocol):
    """The form that a layer reads. `rows`: it is one of FP8 rows, which fused producers can write."""

    rows: bool

    def of(self, x: torch.Tensor) -> Any: ...

    def of_gelu(self, x: torch.Tensor) -> Any: ...


@runtime_checkable
class HasIntake(Protocol):
    intake: Intake | None


@dataclass(frozen=True)
class Rows:
    """FP8 with one scale a row."""

    rows = True

    def of(self, x: torch.Tensor) -> RowFP8:
        return quantised_rows(x)

    def of_gelu(self, x: torch.Tensor) -> RowFP8:
        """The rows of GELU (tanh form) of x, in float32."""
        from .triton_available import fused_fp8

        if fuses(x) and fused_fp8(x):
            from .triton_rows import gelu_rows_fused

            return gelu_rows_fused(x)
        return replace(quantised_rows(F.gelu(x.to(torch.float32), approximate="tanh")), dtype=x.dtype)


@dataclass(frozen=True)
class Groups:
    """NVFP4 with one amax a sample; `share` makes the amax of a part that of the whole (None: the part is the whole)."""

    rule: str
    share: Any = None

    rows = False

    def of(self, x: torch.Tensor) -> NVFP4:
        """Of x [..., M, K]: what comes before M are samples."""
        batched = x.reshape(-1, *x.shape[-2:])
        amax = None if self.share is None else self.share(batched.detach().abs().amax((1, 2)).to(torch.float32))
        return quantised_activation(batched, self.rule, amax)

    def of_gelu(self, x: torch.Tensor) -> NVFP4:
        return self.of(F.gelu(x, approximate="tanh"))


def intake_of(x: torch.Tensor, *layers: nn.Module) -> Intake | None:
    """The form in which all `layers` would read `x`; None: the plain tensor."""
    if not layers or not unrecorded(x):
        return None
    first = _own(layers[0])
    return first if first is not None and all(_own(layer) == first for layer in layers[1:]) else None


def _own(layer: nn.Module) -> Intake | None:
    plain = layer._forward_hooks or layer._forward_pre_hooks or not isinstance(layer, HasIntake)
    return None if plain else layer.intake


def prepared(x: torch.Tensor | Any, *layers: nn.Module) -> torch.Tensor | Any:
    """`x` as all `layers` take it: made once for all of them. What is prepared already stays."""
    if not isinstance(x, torch.Tensor):
        return x
    intake = intake_of(x, *layers)
    return x if intake is None else intake.of(x)


def wants_rows(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether a fused producer should write FP8 rows for `layers` in place of a tensor like `x`."""
    from .triton_available import fused_fp8

    intake = intake_of(x, *layers)
    return intake is not None and intake.rows and fused_fp8(x)
