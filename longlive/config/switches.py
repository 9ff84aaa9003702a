"""Settings that nothing reads while the switch before them is off: where they are given, one line says so."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

from .keys import schema_keys
from .root import Config

NETWORKS = ("generator_quant", "real_score_quant", "fake_score_quant")  # training reads them; null means as model_quant
LAYERS = ("filtered_modules", "use_default_filtered_modules", "skip_first_blocks", "skip_last_blocks")  # FP8 reads these too
SWITCHED = {
    "fp8_backend": "fp8_quant",
    **{f"inference.kv_quant_{leaf}": "inference.kv_quant" for leaf in ("format", "keep_sinks", "scale_rule")},
}


def without_switch(config: Config, training: bool) -> Iterator[str]:
    """One line per key that differs from its default while nothing reads it: key, value, switch."""
    for key, field in schema_keys().items():
        switches = _switches(key, training)
        if not switches or any(_on(config, switch) for switch in switches):
            continue
        value = _value(config, key)
        if value != field.get_default():
            yield f"{config.provenance[key]}: {key} = {value!r} is ignored: {' and '.join(switches)} {'is' if len(switches) == 1 else 'are'} off"


def _switches(key: str, training: bool) -> tuple[str, ...]:
    """The switches that let something read `key`; none for a key without one."""
    if key in SWITCHED:
        return (SWITCHED[key],)
    for prefix in ("model_quant", *(NETWORKS if training else ())):
        if key.startswith(f"infra.{prefix}_"):
            several = ("model_quant", *NETWORKS) if training and prefix == "model_quant" else (prefix,)
            low = ("fp8_quant",) if key.removeprefix(f"infra.{prefix}_") in LAYERS else ()
            return (*(f"infra.{name}" for name in several), *low)
    return ()


def _on(config: Config, switch: str) -> bool:
    value = _value(config, switch)
    return config.infra.model_quant if value is None else value


def _value(config: Config, key: str):
    return reduce(getattr, key.split("."), config)
