"""Judging numbers: elementwise for outputs, by relative Frobenius norm for gradients, exactly for tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Difference:
    """error: the largest absolute error (relative Frobenius for gradients). share: the largest error / tolerance; at most 1 passes."""

    error: float
    share: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.share <= 1.0


def compare_tensor(name: str, ours: torch.Tensor, recorded: torch.Tensor, tolerance: dict[str, float]) -> Difference:
    """`ours` against `recorded`: |x - out| <= atol + rtol |out| elementwise; `grad.*` by |x - out| / |out| <= grad_rel_fro."""
    if not isinstance(ours, torch.Tensor):
        return Difference(error=math.inf, share=math.inf, note=f"{name} is a {type(ours).__name__}, not a tensor")
    if tuple(ours.shape) != tuple(recorded.shape):
        return Difference(error=math.inf, share=math.inf, note=f"{name} has shape {list(ours.shape)}, recorded {list(recorded.shape)}")
    x, out = ours.detach().to("cpu", torch.float64), recorded.to(torch.float64)
    if x.numel() == 0:
        return Difference(error=0.0, share=0.0)
    same = (x == out) | (x.isnan() & out.isnan())
    if name.startswith("grad."):
        norm, bound = out.norm().item(), tolerance["grad_rel_fro"]
        apart = torch.where(same, 0.0, x - out).norm().item()
        error = apart / norm if norm > 0 else apart
        return Difference(error=_number(error), share=_share(error, bound))
    error = torch.where(same, 0.0, (x - out).abs())
    bound = tolerance["atol"] + tolerance["rtol"] * out.abs()
    share = torch.where(same, 0.0, torch.where(bound > 0, error / bound.clamp_min(1e-300), math.inf))
    return Difference(error=_number(error.max().item()), share=_number(share.max().item()))


def compare_table(ours: Any, recorded: Any, float_tolerance: float) -> Difference:
    """Equality of JSON values; floats may differ by `float_tolerance`. The error counts the leaves that differ."""
    wrong = list(_leaves_that_differ(ours, recorded, float_tolerance, "output"))
    if not wrong:
        return Difference(error=0.0, share=0.0)
    return Difference(error=float(len(wrong)), share=math.inf, note=wrong[0])


def _leaves_that_differ(ours: Any, recorded: Any, tolerance: float, path: str):
    if isinstance(ours, tuple):
        ours = list(ours)
    if isinstance(recorded, dict) and isinstance(ours, dict):
        for key in sorted(set(recorded) ^ set(ours)):
            yield f"{path}.{key} is {'missing' if key in recorded else 'not recorded'}"
        for key in sorted(set(recorded) & set(ours)):
            yield from _leaves_that_differ(ours[key], recorded[key], tolerance, f"{path}.{key}")
    elif isinstance(recorded, list) and isinstance(ours, list):
        if len(recorded) != len(ours):
            yield f"{path} has {len(ours)} elements, recorded {len(recorded)}"
            return
        for number, (mine, theirs) in enumerate(zip(ours, recorded)):
            yield from _leaves_that_differ(mine, theirs, tolerance, f"{path}[{number}]")
    elif not _equal(ours, recorded, tolerance):
        yield f"{path} is {ours!r}, recorded {recorded!r}"


def _equal(ours: Any, recorded: Any, tolerance: float) -> bool:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (ours, recorded))
    if numbers:
        return ours == recorded or abs(ours - recorded) <= tolerance
    return type(ours) is type(recorded) and ours == recorded


def _share(error: float, bound: float) -> float:
    if math.isnan(error):
        return math.inf
    return error / bound if bound > 0 else (0.0 if error == 0 else math.inf)


def _number(value: float) -> float:
    """NaN counts as infinitely wrong."""
    return math.inf if math.isnan(value) else value
