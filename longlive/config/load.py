"""From a file, a dict or an OmegaConf object, and overrides, to one checked `Config`.

Steps: read -> bring each written key home (aliases, flat keys) -> lay presets under it and overrides over it -> derive the defaults that
depend on other keys -> validate types -> check across keys. Each value keeps the name of where it came from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..core.errors import ConfigError, nearest
from ..core.log import warn_once
from .aliases import INERT, INERT_IN_ROLLOUTS, WITHOUT_EFFECT
from .checks import check
from .keys import home_of, schema_keys, section_names
from .presets import RELEASED, SHAPES
from .root import Config
from .world import VAEStage
from .yaml_io import parse_yaml, read_yaml

OVERRIDE = "override"
Given = dict[str, tuple[Any, str]]


def load_config(source: Any, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in `source` with `key=value` overrides on top.

    `source`: path of a YAML file, a dict (sections and flat keys as in a file), an OmegaConf object, or a Config (returned with the
    overrides applied). Raises ConfigError: one line with the file, the dotted key, the value and the remedy.
    """
    if isinstance(source, Config):
        given, name = dict(source._given), source.source
        if not overrides:
            return source
    else:
        tree, name = _read(source)
        given = _collect(tree, name or "config")
    changes = parse_overrides(overrides, given)
    return resolve({**given, **changes}, name)


def default_config(model: str = "tiny", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The released settings of `model`, without any file."""
    key = _model_key(model, "--model")
    given: Given = {"model_kwargs.model_name": (model, f"preset {key}")}
    given.update({k: (v, f"preset {key}") for k, v in RELEASED[key].items()})
    changes = parse_overrides(overrides, given)
    return resolve({**given, **changes}, "")


def parse_overrides(overrides, given: Given) -> Given:
    """`key=value` words -> home keys; values are YAML. Later words win. An absent section is removed from `given` by `adapter=null`."""
    found: Given = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {word!r} is not key=value; write for example inference.sampling_steps=2")
        value = parse_yaml(text, f"override {word}") if text else None
        for home, item in _collect({key.strip(): value}, f"override {word}", given).items():
            found.pop(home, None)
            found[home] = (item[0], OVERRIDE)
    return found


def resolve(given: Given, name: str) -> Config:
    """Presets, derived defaults, types and checks on home keys; `name` is the file for messages."""
    label = name or "config"
    layered = _with_presets(given, label)
    _derive(layered)
    tree: dict[str, Any] = {section: {} for section, optional in section_names().items() if not optional and "." not in section}
    for key, (value, _) in layered.items():
        node = tree
        *path, leaf = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    try:
        config = Config(**tree)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, layered, label)) from None
    config._given = given
    config._source = name
    config._provenance = {key: layered[key][1] if key in layered else "default" for key in schema_keys()}
    _report_inert(config, given)
    check(config, label)
    return config


def _read(source: Any) -> tuple[dict, str]:
    if isinstance(source, (str, Path)):
        return read_yaml(source), str(source)
    if type(source).__module__.partition(".")[0] == "omegaconf":
        source = sys.modules["omegaconf"].OmegaConf.to_container(source, resolve=True)
    if isinstance(source, dict):
        return source, ""
    raise ConfigError(f"a configuration is a path, a dict or an OmegaConf object, not {type(source).__name__}")


def _collect(tree: dict, origin: str, below: Given | None = None) -> Given:
    """Nested mapping -> home keys. Two spellings of one key with different values are an error; inert keys are reported once and dropped."""
    found: Given = {}
    written_as: dict[str, str] = {}

    def take(written: str, value: Any) -> None:
        if isinstance(value, dict) and _is_group(written):
            for key, inner in value.items():
                take(f"{written}.{key}" if written else str(key), inner)
            return
        if value is None and written in ("model", "model.kwargs"):
            return
        home = home_of(written, origin)
        if home is None:
            leaf = written.rpartition(".")[2]
            reason = next(r for k, r in INERT.items() if k.rpartition(".")[2] == leaf)
            warn_once(f"{origin}: {written} is ignored: {reason}")
        elif home in section_names():
            _take_section(home, value)
        else:
            value = _tuples(value)
            if home in found and found[home][0] != value:
                raise ConfigError(
                    f"{origin}: {written_as[home]} = {found[home][0]!r} contradicts {written} = {value!r}; they are one key, keep one of them"
                )
            found[home], written_as[home] = (value, origin), written

    def _take_section(home: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                take(f"{home}.{key}", inner)
            if not value and section_names()[home] and home in ("adapter",):
                found["adapter.type"] = ("lora", origin)
        elif value is not None:
            raise ConfigError(f"{origin}: {home} is a section, not {value!r}; give its keys")
        elif below is not None:
            for key in [k for k in below if k.startswith(home + ".")]:
                del below[key]

    for key, value in tree.items():
        take(str(key), value)
    return found


def _is_group(written: str) -> bool:
    """Whether a mapping under this name is sections, not the value of a key."""
    return (written in section_names() and written != "adapter") or written in ("model", "model.kwargs")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _model_key(name: Any, origin: str) -> str:
    key = str(name).lower()
    if key not in SHAPES:
        close = nearest(key, SHAPES)
        raise ConfigError(f"{origin}: unknown model {name!r}{f'; did you mean {close}?' if close else ''} (known: {', '.join(SHAPES)})")
    return key


def _with_presets(given: Given, label: str) -> Given:
    name = given.get("model_kwargs.model_name", (schema_keys()["model_kwargs.model_name"].default, ""))[0]
    key = _model_key(name, f"{label}: model_kwargs.model_name")
    preset = {**SHAPES[key], **(RELEASED[key] if key == "tiny" else {})}
    return {**{k: (v, f"preset {key}") for k, v in preset.items()}, **given}


# key -> the key whose value it takes when it is null or not given
FOLLOWS = {
    "inference.sink_size": "model_kwargs.sink_size",
    "inference.local_attn_size": "model_kwargs.local_attn_size",
    "inference.inference_t_scale": "model_kwargs.t_scale",
    "data.eval_data_path": "data.data_path",
    "algorithm.independent_first_frame": "algorithm.i2v",
}


def _derive(layered: Given) -> None:
    """Fills the defaults that depend on other keys."""

    def value(key: str) -> Any:
        return layered[key][0] if key in layered else schema_keys()[key].get_default()

    for key, source in FOLLOWS.items():
        if value(key) is None:
            layered[key] = (value(source), f"as {source}")
    shape = value("data.image_or_video_shape")
    if value("num_output_frames") is None and isinstance(shape, tuple) and len(shape) == 5:
        layered["num_output_frames"] = (shape[1], "as data.image_or_video_shape[1]")


def _first_problem(error: ValidationError, layered: Given, label: str) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    key = next((".".join(location[:n]) for n in range(len(location), 0, -1) if ".".join(location[:n]) in schema_keys()), ".".join(location))
    rest = location[len(key.split(".")) :]
    prefix = layered.get(key, (None, label))[1]
    if problem["type"] == "extra_forbidden" and rest:
        close = nearest(rest[-1], VAEStage.model_fields)
        return f"{prefix}: unknown key {'.'.join(location)}{f'; did you mean {close}?' if close else ''}"
    shown = problem["input"] if rest else layered.get(key, (problem["input"],))[0]
    message = problem["msg"][0].lower() + problem["msg"][1:].replace("a valid boolean", "true or false")
    same = [other for other in error.errors()[1:] if other["type"] == "literal_error" and ".".join(map(str, other["loc"])).startswith(f"{key}.")]
    message = ", or ".join([message, *(other["ctx"]["expected"] for other in same)])
    if problem["type"] == "missing" and rest and rest[-1].isdigit():
        shown, message = layered[key][0], f"entry number {int(rest[-1]) + 1} is missing; give all of them, as `longlive config schema` shows"
    return f"{prefix}: {key} = {shown!r}: {message.replace('input should', 'it should')}"


def _report_inert(config: Config, given: Given) -> None:
    rollouts = config.algorithm.trainer == "score_distillation" and config.algorithm.backward_simulation
    for key, reason in (WITHOUT_EFFECT | (INERT_IN_ROLLOUTS if rollouts else {})).items():
        if key in given:
            warn_once(f"{given[key][1]}: {key} is ignored: {reason}")
