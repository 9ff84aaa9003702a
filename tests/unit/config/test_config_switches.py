"""A setting whose switch is off: said once with key, value and switch; a misspelt value is refused all the same."""

import typing
from pathlib import Path

import pytest

from longlive.config import availability, load_config
from longlive.config.keys import schema_keys
from longlive.config.quant import PackedBackend
from longlive.config.switches import without_switch
from longlive.core.errors import ConfigError
from longlive.core.log import warn_once
from longlive.precision.backends import ALIASES, FLOATING, PACKED

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.stem.startswith(("train", "inference")))
TRAIN = {"teacher_forcing": True, "num_frame_per_block": 8}
ALONE = "infra.model_quant is off"
ALL = "infra.model_quant and infra.generator_quant and infra.real_score_quant and infra.fake_score_quant are off"


def said(source, training=False):
    return list(without_switch(load_config(source), training))


@pytest.mark.parametrize(
    "given, training, words",
    [
        ({"model_quant_backend": "w4a8"}, False, f"infra.model_quant_backend = 'w4a8' is ignored: {ALONE}"),
        ({"model_quant_scale_rule": "mse"}, False, f"infra.model_quant_scale_rule = 'mse' is ignored: {ALONE}"),
        ({"model_quant_scale_rule": "mse", "generator_quant": True}, False, ALONE),
        ({"model_quant_scale_rule": "mse", "fp8_quant": True}, False, ALONE),
        ({"model_quant_use_transformer_engine": True}, False, ALONE),
        ({"model_quant_filtered_modules": ["head"]}, False, "= ('head',) is ignored: infra.model_quant and fp8_quant are off"),
        ({"model_quant_skip_last_blocks": 1}, False, "infra.model_quant and fp8_quant are off"),
        ({"model_quant_weight_scale_rule": "mae"}, True, ALL),
        ({"generator_quant_scale_rule": "mse"}, True, "infra.generator_quant_scale_rule = 'mse' is ignored: infra.generator_quant is off"),
        ({"model_quant": True, "fake_score_quant": False, "fake_score_quant_scale_rule": "mse"}, True, "infra.fake_score_quant is off"),
        ({"fp8_backend": "torchao"}, False, "fp8_backend = 'torchao' is ignored: fp8_quant is off"),
        ({"fp8_backend": "fp8", "model_quant": True}, False, "fp8_quant is off"),
        ({"kv_quant_format": "int8"}, False, "inference.kv_quant_format = 'int8' is ignored: inference.kv_quant is off"),
        ({"kv_quant_keep_sinks": True}, True, "inference.kv_quant_keep_sinks = True is ignored: inference.kv_quant is off"),
        ({"kv_quant_scale_rule": "mae"}, False, "inference.kv_quant_scale_rule = 'mae' is ignored: inference.kv_quant is off"),
    ],
)
def test_a_setting_without_its_switch_is_named(given, training, words):
    (line,) = said({**TRAIN, **given}, training)
    assert line.startswith("config: ") and words in line and "\n" not in line


@pytest.mark.parametrize(
    "given, training",
    [
        ({"model_quant_backend": None, "model_quant_scale_rule": "static_6", "kv_quant_format": "nvfp4", "fp8_backend": None}, False),
        ({"model_quant": True, "model_quant_backend": "w4a8", "model_quant_scale_rule": "mse"}, False),
        ({"model_quant": False, "model_quant_use_transformer_engine": False, "kv_quant": False}, False),
        ({"fp8_quant": True, "fp8_backend": "torchao", "model_quant_filtered_modules": ["head"], "model_quant_skip_first_blocks": 1}, False),
        ({"kv_quant": True, "kv_quant_format": "int8", "kv_quant_keep_sinks": True, "kv_quant_scale_rule": "mae"}, False),
        ({"fake_score_quant": True, "model_quant_scale_rule": "mse"}, True),
        ({"model_quant": True, "generator_quant_scale_rule": "mse"}, True),
        ({"generator_quant_scale_rule": "mse"}, False),
    ],
)
def test_what_is_read_or_says_nothing_new_is_not(given, training):
    assert said({**TRAIN, **given}, training) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_set_nothing_in_vain(path):
    assert said(path, path.stem.startswith("train")) == []


def test_it_is_said_once_before_weights_are_read(caplog):
    warn_once.cache_clear()
    for _ in range(2):
        availability(load_config({}, ["inference.kv_quant_format=fp8"]), "generate")
        availability(load_config(TRAIN, ["inference.kv_quant_format=fp8"]), "train")
    assert [record.getMessage() for record in caplog.records] == ["override: inference.kv_quant_format = 'fp8' is ignored: inference.kv_quant is off"]


@pytest.mark.parametrize("switch", ["false", "true"])
@pytest.mark.parametrize(
    "key, on, known",
    [("model_quant_backend", "model_quant", "'w4a8', 'w4a16', 'native'"), ("fp8_backend", "fp8_quant", "'fp8' or 'torchao'")],
)
def test_a_misspelt_backend_is_refused_whatever_the_switch_says(switch, key, on, known):
    with pytest.raises(ConfigError) as error:
        load_config({}, [f"{on}={switch}", f"{key}=w4a9"])
    assert f"{key} = 'w4a9': it should be " in str(error.value) and known in str(error.value) and "\n" not in str(error.value)


def test_the_schema_knows_the_backends_that_there_are():
    published = [name for name, ours in ALIASES.items() if ours in PACKED]
    assert set(typing.get_args(PackedBackend)) == {*PACKED, *published}
    assert typing.get_args(typing.get_args(schema_keys()["fp8_backend"].annotation)[0]) == FLOATING
