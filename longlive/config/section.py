"""The base of every configuration section: typed, frozen, and closed to unknown keys.

Strict types: `sampling_steps: "4"` and `sampling_steps: 4.0` are errors, `lr: 1` is a float. YAML lists arrive as tuples.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A group of keys. Instances are immutable; a changed configuration is a new one (`Config.with_overrides`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


def option(default: Any, meaning: str, **bounds: Any) -> Any:
    """One key: its only default, its meaning (shown by `longlive config schema`), and bounds such as `ge=1`."""
    return Field(default=default, description=meaning, **bounds)
