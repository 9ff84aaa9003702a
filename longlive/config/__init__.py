"""The typed configuration: the documented schema, strict and frozen, where every value knows where it came from."""

from .availability import availability
from .load import default_config, load_config
from .root import Config
from .section import Section

__all__ = ["Config", "Section", "availability", "default_config", "load_config"]
