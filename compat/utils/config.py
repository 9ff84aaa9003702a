"""`normalize_config`: a path, a dict or an OmegaConf object becomes the typed configuration."""

from longlive.config import load_config as normalize_config

__all__ = ["normalize_config"]
