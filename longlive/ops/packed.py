"""What all quantised tensors share: frozen parts, bytes, equality, a state for checkpoints, and a module that holds one safely.

A blanket `.to(bfloat16)` of a model casts every floating-point parameter and buffer. `Packed` therefore registers only integers (the bits of scales and
amax), which such a cast leaves alone while a move to a device takes them along. The frozen tensors themselves refuse a cast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import nn

from ..core.errors import CheckpointError, ConfigError, InputError

NONFINITE = ("raise", "nan")
BITS = {torch.float32: torch.int32, torch.int32: torch.int32, torch.uint8: torch.uint8, torch.int8: torch.int8}


class PackedTensor:
    """Base of quantised tensors: frozen dataclasses whose fields named in `parts` are tensors. `formats` maps a format's name to its class."""

    name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    formats: ClassVar[dict[str, type[PackedTensor]]] = {}

    def __init_subclass__(cls, **given):
        super().__init_subclass__(**given)
        PackedTensor.formats[cls.name] = cls

    @property
    def bytes(self) -> int:
        """Memory of all parts."""
        return sum(part.nbytes for part in self.state().values())

    @property
    def device(self) -> torch.device:
        return self.state()["codes"].device

    def state(self) -> dict[str, torch.Tensor]:
        """The parts by name, for a checkpoint; `describe` holds the rest."""
        return {name: self.__dict__[name] for name in self.parts}

    def describe(self) -> dict[str, Any]:
        """What the parts mean, in JSON's types; `from_state(state(), describe())` is an equal tensor."""
        raise NotImplementedError

    def to(self, device: torch.device | str) -> PackedTensor:
        """The same on another device. Raises InputError for a dtype: parts have the types of their format."""
        if isinstance(device, torch.dtype):
            raise InputError(f"a {self.name} tensor cannot be cast to {device}; use dequantise({device})")
        return replace(self, **{name: part.to(device) for name, part in self.state().items()})

    def __eq__(self, other) -> bool:
        """Equal bits in every part, and all else equal."""
        if type(self) is not type(other):
            return NotImplemented
        rest = (f.name for f in fields(self) if f.name not in self.parts)
        same = all(self.__dict__[name] == other.__dict__[name] for name in rest)
        return same and all(_same_bits(mine, theirs) for mine, theirs in zip(self.state().values(), other.state().values()))

    __hash__ = None


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def from_state(parts: Mapping[str, torch.Tensor], description: Mapping[str, Any]) -> PackedTensor:
    """The tensor whose `state` and `describe` gave these. Raises CheckpointError for an unknown format, a missing part, a part of another type or shape."""
    kind = PackedTensor.formats.get(description.get("format"))
    if kind is None:
        known = ", ".join(PackedTensor.formats)
        raise CheckpointError(f"the quantisation format {description.get('format')!r} is unknown; known are {known}; use a newer version, or the bf16 weights")
    missing = [name for name in kind.parts if name not in parts]
    if missing:
        raise CheckpointError(f"a {kind.name} tensor lacks its {missing[0]}; the file is incomplete: save it again")
    try:
        return kind.build(dict(parts), dict(description))
    except KeyError as error:
        raise CheckpointError(f"the description of a {kind.name} tensor lacks {error}; save the file again") from None


def check_part(name: str, part: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raises CheckpointError unless `part` has this type and shape."""
    if part.dtype != dtype:
        raise CheckpointError(f"the {name} of a quantised tensor are {part.dtype}, not {dtype}: a cast of the file destroyed them; take the original file")
    if tuple(part.shape) != tuple(shape):
        raise CheckpointError(f"the {name} of a quantised tensor have shape {list(part.shape)}, expected {list(shape)}; the file is damaged")


def dtype_named(name: str) -> torch.dtype:
    """torch's dtype of that name. Raises CheckpointError for any other word."""
    known = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
    if name not in known:
        raise CheckpointError(f"{name!r} is no dtype of a quantised tensor; known are {', '.join(known)}")
    return known[name]


def divided(x: torch.Tensor, number: float) -> torch.Tensor:
    """x / number, correctly rounded on every device: with a plain Python number CUDA multiplies by the reciprocal."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def finite_or_refuse(amax: torch.Tensor, on_nonfinite: str) -> None:
    """Raises InputError for infinity or NaN in `amax` where `on_nonfinite` is "raise"."""
    if on_nonfinite not in NONFINITE:
        raise ConfigError(f"on_nonfinite is {on_nonfinite!r}; use raise or nan")
    if on_nonfinite == "raise" and not bool(amax.isfinite().all()):
        raise InputError("a tensor to be quantised holds infinity or NaN; look at what produced it, or quantise with on_nonfinite nan to pass NaN on")


class Packed(nn.Module):
    """Holds one quantised tensor in a model: buffers of integers only, so that no cast of the model changes it. `tensor` gives it back."""

    def __init__(self, tensor: PackedTensor):
        super().__init__()
        self._description, self._types = tensor.describe(), {}
        for name, part in tensor.state().items():
            self._types[name] = part.dtype
            self.register_buffer(name, part.view(BITS[part.dtype]))

    @property
    def tensor(self) -> PackedTensor:
        return from_state({name: self.get_buffer(name).view(kind) for name, kind in self._types.items()}, self._description)
