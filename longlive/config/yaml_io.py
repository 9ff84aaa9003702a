"""YAML as configuration files need it: `1e-5` is a number, a key given twice is an error, errors name file and line."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from ..core.errors import ConfigError

_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with floats as YAML 1.2 reads them."""

    def construct_mapping(self, node, deep=False):
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice (first on line {seen[key]})", key_node.start_mark)
            seen[key] = line
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse_yaml(text: str, name: str) -> object:
    """The value of a YAML document; ConfigError with `name`, line and reason where it is none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        marked = isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None
        where = f"{name}:{error.problem_mark.line + 1}" if marked else name
        problem = error.problem if marked and error.problem else str(error).splitlines()[0]
        raise ConfigError(f"{where}: not valid YAML: {problem}; correct that line") from error


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file; {} for a file of comments only."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; give the path of a YAML file, such as configs/inference.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error.__class__.__name__}); give a YAML file") from error
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a {type(value).__name__}, not sections and keys; see configs/inference.yaml for the layout")
    return value
