"""What a device can compute with: one probe, asked once, by architecture families and not by "newer than".

Families differ in kind: consumer Blackwell (12.x) has FP4 tensor cores but no datacentre instructions, Hopper has FP8 and no FP4, Ampere neither.
A card of no known family is treated as one without low-precision tensor cores (spec nvfp4 §8.1).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

CPU, AMPERE, ADA, HOPPER = "cpu", "ampere", "ada", "hopper"
BLACKWELL, BLACKWELL_CONSUMER, UNKNOWN = "blackwell", "blackwell-consumer", "unknown"
FP8_FAMILIES = (ADA, HOPPER, BLACKWELL, BLACKWELL_CONSUMER)
FP4_FAMILIES = (BLACKWELL, BLACKWELL_CONSUMER)
FAMILIES = {(8, 0): AMPERE, (8, 6): AMPERE, (8, 7): AMPERE, (8, 9): ADA, (9, 0): HOPPER}
MAJORS = {10: BLACKWELL, 12: BLACKWELL_CONSUMER}


@dataclass(frozen=True, kw_only=True)
class Capability:
    """`family` of the device, and what of torch and other packages is there. `name` in the words of its maker."""

    family: str
    name: str
    scaled_mm: bool = False
    scaled_mm_blocks: bool = False
    triton: bool = False
    torchao: bool = False
    transformer_engine: bool = False


def family_of(major: int, minor: int) -> str:
    """The family of a compute capability."""
    return FAMILIES.get((major, minor)) or MAJORS.get(major, UNKNOWN)


def probe(device: torch.device | str) -> Capability:
    """The capability of `device` and of this installation."""
    device = torch.device(device)
    there = {name: importlib.util.find_spec(name) is not None for name in ("triton", "torchao", "transformer_engine")}
    options = there | {"scaled_mm": hasattr(torch, "_scaled_mm"), "scaled_mm_blocks": hasattr(torch.nn.functional, "scaled_mm")}
    if device.type != "cuda":
        return Capability(family=CPU, name=device.type, **options)
    return Capability(family=family_of(*torch.cuda.get_device_capability(device)), name=torch.cuda.get_device_name(device), **options)
