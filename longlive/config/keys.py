"""Every key of the schema by its dotted name, and the way from a written key to its home."""

from __future__ import annotations

import types
import typing
from functools import lru_cache

from pydantic.fields import FieldInfo

from ..core.errors import ConfigError, nearest
from .aliases import ALIASES, FLATTENED, INERT
from .root import Config
from .section import Section


def section_of(field: FieldInfo) -> tuple[type[Section] | None, bool]:
    """(section class of a field or None, whether the section may be absent)."""
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        for part in typing.get_args(annotation):
            if isinstance(part, type) and issubclass(part, Section):
                return part, True
    return None, False


def _walk(model: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    leaves = {}
    for name, field in model.model_fields.items():
        section, _ = section_of(field)
        if section is None:
            leaves[prefix + name] = field
        else:
            leaves.update(_walk(section, f"{prefix}{name}."))
    return leaves


@lru_cache(maxsize=None)
def schema_keys() -> dict[str, FieldInfo]:
    """Dotted key -> field, in the order of the schema."""
    return _walk(Config)


@lru_cache(maxsize=None)
def section_names() -> dict[str, bool]:
    """Dotted section name -> whether it may be absent."""

    def walk(model, prefix):
        found = {}
        for name, field in model.model_fields.items():
            section, optional = section_of(field)
            if section is not None:
                found[prefix + name] = optional
                found.update(walk(section, f"{prefix}{name}."))
        return found

    return walk(Config, "")


@lru_cache(maxsize=None)
def _homes() -> dict[str, list[str]]:
    """Bare name -> homes in the flattened sections and at top level."""
    homes: dict[str, list[str]] = {}
    for key in schema_keys():
        section, _, leaf = key.rpartition(".")
        if section in FLATTENED or section == "":
            homes.setdefault(leaf, []).append(key)
    return homes


def home_of(written: str, origin: str) -> str | None:
    """The schema key that `written` means; None for an inert key. ConfigError with the nearest key for an unknown one."""
    keys = schema_keys()
    if written in keys or written in section_names():
        return written
    if written in ALIASES:
        return ALIASES[written]
    if written in INERT:
        return None
    if written.startswith("model.kwargs."):
        return home_of("model_kwargs." + written.removeprefix("model.kwargs."), origin)
    section, _, leaf = written.rpartition(".")
    if section == "" or section in FLATTENED:
        if leaf in ALIASES:
            return ALIASES[leaf]
        homes = _homes().get(leaf, [])
        if len(homes) == 1:
            return homes[0]
        if any(key.rpartition(".")[2] == leaf for key in INERT if key.partition(".")[0] in FLATTENED):
            return None
    first, _, rest = written.partition(".")
    if first in FLATTENED and first != "training" and rest.startswith("error_recycling."):
        return home_of("training." + rest, origin)
    raise ConfigError(_unknown(written, origin))


def _unknown(written: str, origin: str) -> str:
    section, _, leaf = written.rpartition(".")
    leaves = {k: k.rpartition(".")[2] for k in schema_keys()}
    close = nearest(leaf, [name for k, name in leaves.items() if k.rpartition(".")[0] == section])
    best = (f"{section}." if section else "") + close if close else nearest(written, [*schema_keys(), *ALIASES])
    if best is None:
        close = nearest(leaf, leaves.values())
        best = next((k for k, name in leaves.items() if name == close), None)
    hint = f"did you mean {best}?" if best else "`longlive config schema` lists the keys"
    return f"{origin}: unknown key {written}; {hint}"
