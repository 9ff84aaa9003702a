"""A configuration as text: YAML with the origin of each value as a comment, JSON, and the table of all keys."""

from __future__ import annotations

from typing import Any

import yaml

from .keys import schema_keys, section_names
from .root import Config


def config_table(config: Config, *, changed: bool = False) -> dict[str, Any]:
    """The configuration as nested plain values. `changed`: only keys whose origin is not "default"."""
    tree = config.model_dump(mode="json")
    if not changed:
        return tree
    kept: dict[str, Any] = {}
    for key, origin in config.provenance.items():
        value = _at(tree, key)
        if origin == "default" or value is _ABSENT:
            continue
        node = kept
        *path, leaf = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return kept


def config_yaml(config: Config, *, changed: bool = False) -> str:
    """YAML that loads back to the same configuration; every line ends with the origin of its value."""
    tree, origins, lines = config_table(config, changed=changed), config.provenance, []

    def emit(node: dict, prefix: str, indent: str) -> None:
        for name, value in node.items():
            key = prefix + name
            if key in section_names() and isinstance(value, dict):
                lines.append(f"{indent}{name}:")
                emit(value, key + ".", indent + "  ")
            else:
                lines.append(f"{indent}{name}: {_scalar(value)}  # {origins.get(key, 'default')}")

    emit(tree, "", "")
    return "\n".join(lines) + "\n"


def config_schema() -> dict:
    """JSON Schema of the nested form."""
    return Config.model_json_schema()


def schema_table() -> str:
    """One line per key: name, type, default, meaning."""
    width, lines = max(map(len, schema_keys())), []
    for key, field in schema_keys().items():
        default = _scalar(_plain(field.get_default()))
        shown = default if len(default) < 50 else default[:46] + "..."
        lines.append(f"{key:<{width}}  {_type_name(field.annotation)}, default {shown}: {field.description}\n")
    return "".join(lines)


_ABSENT = object()


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return _ABSENT
        tree = tree[part]
    return tree


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("\n").removesuffix("\n...").strip()


def _type_name(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    for noise in ("typing.", "longlive.config.world.", "<class '", "'>", "NoneType"):
        text = text.replace(noise, "null" if noise == "NoneType" else "")
    return text.replace("| None", "| null").replace("Optional", "null or ")
