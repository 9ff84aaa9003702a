"""Where keys go, which values win, and what every message says."""

import pytest
import yaml

from longlive.config import availability, default_config, load_config
from longlive.config.aliases import ALIASES, INERT, WITHOUT_EFFECT
from longlive.config.availability import DISTILLATION_ONLY
from longlive.config.keys import schema_keys, section_names
from longlive.config.presets import RELEASED, SHAPES
from longlive.config.show import config_yaml, schema_table
from longlive.core.errors import ConfigError, NotAvailable
from longlive.models.spec import MODELS


def refusal(source, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("key, home", ALIASES.items())
def test_every_alias_leads_to_a_key(key, home):
    assert home in schema_keys() or home in section_names()


def test_presets_name_real_keys_and_the_models_that_exist():
    assert set(SHAPES) == set(RELEASED) == set(MODELS)
    for name, spec in MODELS.items():
        assert not (set(SHAPES[name]) | set(RELEASED[name])) - set(schema_keys())
        config = default_config(name)
        assert config.data.image_or_video_shape[2:] == (spec.dit.channels, spec.height // 16, spec.width // 16)
        assert config.model_num_heads == spec.dit.heads
        assert config.inference.local_attn_size == spec.window_chunks * config.chunk_frames


@pytest.mark.parametrize(
    "source",
    [
        {"inference": {"sampling_steps": 4, "sink_size": 8}, "model_kwargs": {"num_frame_per_block": 8}},
        {"sampling_steps": 4, "inference_sink_size": 8, "num_frame_per_block": 8},
        {"inference": {"sampling_steps": 4, "inference_sink_size": 8}, "model": {"kwargs": {"num_frame_per_block": 8}}},
        {"evaluation": {"sampling_steps": 4}, "sink_size": 8, "model": {"num_frame_per_block": 8, "name": "Wan2.2-TI2V-5B"}},
    ],
)
def test_one_key_many_spellings(source):
    config = load_config(source)
    assert (config.inference.sampling_steps, config.inference.sink_size, config.chunk_frames) == (4, 8, 8)


def test_keys_go_home_from_flat_and_from_other_sections():
    section = {"save_latent_only": True, "scene_cut_prefix": "Cut. "}
    config = load_config({"i2v": True, "model_quant": True, "return_latents": True, "inference": section})
    assert config.algorithm.i2v and config.algorithm.independent_first_frame and config.infra.model_quant and config.save_latents_only
    assert config.data.scene_cut_prefix == "Cut. "
    assert not config.evaluation.save_latents_only


def test_contradicting_spellings_are_refused():
    message = refusal({"num_frame_per_block": 8, "model_kwargs": {"num_frame_per_block": 4}})
    assert "num_frame_per_block = 8" in message and "model_kwargs.num_frame_per_block = 4" in message


@pytest.mark.parametrize(
    "text, key, hint",
    [
        ("inference:\n  sampling_step: 4\n", "inference.sampling_step;", "inference.sampling_steps"),
        ("trainin:\n  lr: 1\n", "trainin", "training"),
        ("training: {error_recycling: {clean_probe: 0.5}}", "training.error_recycling.clean_probe", "clean_prob"),
        ("vae: {stages: [{hight: 32}]}", "vae.stages.0.hight", "height"),
        ("guidence_scale: 3", "guidence_scale", "guidance_scale"),
        ("adapter: {rnk: 4}", "adapter.rnk", "adapter.rank"),
        ("model_kwargs: {sink: 4}", "model_kwargs.sink", "model_kwargs.sink_size"),
        ("world: {lr: 1}", "world.lr", ""),
        ("? {a: b}\n: 3", "", ""),
    ],
)
def test_unknown_keys_name_the_file_the_key_and_the_nearest(tmp_path, text, key, hint):
    path = write(tmp_path, text)
    message = refusal(path)
    assert str(path) in message and key in message and hint in message


@pytest.mark.parametrize(
    "text, parts",
    [
        ("inference: {sampling_steps: four}", ["inference.sampling_steps", "'four'"]),
        ("inference: {sampling_steps: '4'}", ["inference.sampling_steps", "'4'"]),
        ("inference: {sampling_steps: 0}", ["inference.sampling_steps", "greater than or equal to 1"]),
        ("inference: {multi_shot_sink: 1}", ["inference.multi_shot_sink"]),
        ("inference: {vae_type: lightvae}", ["inference.vae_type", "mg_lightvae"]),
        ("inference: {device: gpu}", ["inference.device", "'gpu'"]),
        ("data: {image_or_video_shape: [1, 8, 48, 44]}", ["data.image_or_video_shape"]),
        ("data: {image_or_video_shape: [1, 8, 48, 45, 80]}", ["720", "multiple of 32"]),
        ("data: {image_or_video_shape: [1, 8, 16, 44, 80]}", ["C = 48"]),
        ("model_kwargs: {original_seq_len: 100}", ["model_kwargs.original_seq_len"]),
        ("model_kwargs: {rope_method: yarn}", ["model_kwargs.rope_method"]),
        ("model_kwargs: {model_name: Wan2.2-TI2V-5}", ["unknown model", "wan2.2-ti2v-5b"]),
        ("inference: 4", ["inference is a section"]),
        ("torch_compile: maybe", ["torch_compile = 'maybe'", "it should be true or false, or 'auto'"]),
        ("inference: {cuda_graphs: 1}", ["inference.cuda_graphs = 1", "it should be true or false, or 'auto'"]),
        ("evaluation: {num_frames: [8, x]}", ["evaluation.num_frames"]),
        ("- a\n- b", ["list"]),
        ("a: [1", [":1:", "not valid YAML"]),
        ("i2v: true\n\ni2v: false", [":3:", "twice"]),
    ],
)
def test_bad_values_name_key_value_and_rule(tmp_path, text, parts):
    message = refusal(write(tmp_path, text))
    assert str(tmp_path) in message
    for part in parts:
        assert part in message, message


CHUNK8 = {"num_frame_per_block": 8}
FORCED = {"teacher_forcing": True}
DMD = {**CHUNK8, "trainer": "score_distillation"}
ROLLOUT = {"min_num_training_frames": 32, "num_training_frames": 32, "slice_last_frames": 32}
REGRESSION = {
    **CHUNK8,
    "algorithm": {"trainer": "score_distillation", "teacher_forcing": True, "regression_steps": 9},
    "inference": {"multi_shot_rope_offset": 8.0},
    "training": {**ROLLOUT, "visibility": "window", "shot_offset": True},
}
OFF_POLICY = {**DMD, "training": ROLLOUT, "backward_simulation": False, "data": {"data_path": "videos"}}


@pytest.mark.parametrize(
    "source, equation",
    [
        ({**CHUNK8, "num_output_frames": 100}, "num_output_frames(100) % num_frame_per_block(8) = 4"),
        ({**CHUNK8, "evaluation": {"num_frames": [32, 33]}}, "evaluation.num_frames(33) % num_frame_per_block(8) = 1"),
        ({**CHUNK8, "sink_size": 4}, "inference.sink_size(4) is neither 0 nor num_frame_per_block(8)"),
        ({**CHUNK8, "inference_local_attn_size": 20}, "inference.local_attn_size(20) % num_frame_per_block(8) = 4"),
        ({**CHUNK8, "local_attn_size": 16, "sink_size": 8, "multi_shot_sink": True}, "inference.local_attn_size(16) < 24 = 3 chunks of 8"),
        ({"fp8_quant": True, "model_quant": True}, "fp8_quant(true) and model_quant(true)"),
        ({"checkpoints": {"lora_ckpt": "a.pt"}}, "without an adapter section"),
        ({"merge_lora": True}, "merge_lora(true) without an adapter"),
        ({"adapter": {"rank": 4}, "training": {"optimizer": "muon"}}, "optimizer(muon) with an adapter section"),
        ({"checkpoints": {"lora_ckpt": ["a.pt", "b.pt"]}, "adapter": {"weight": [1.0]}}, "adapter.weight has 1 numbers for 2 LoRA files"),
        ({"independent_first_frame": True}, "i2v(False) != independent_first_frame(True)"),
        ({**CHUNK8, "sp_size": 3}, "sp_size(3) is none of"),
        ({"sp_size": 4}, "num_frame_per_block(1) % sp_size(4)"),
        ({"noise_augmentation_max_timestep": 9, "training": {"context_noise": 0.1}}, "timestep(9) and training.context_noise(0.1) both put noise"),
        (
            {"position_gap": 64, "visibility": "window", "use_relative_rope": True, "local_attn_size": 3},
            "position_gap(64) has no meaning for positions inside the window",
        ),
        ({**DMD, "training": {**ROLLOUT, "num_training_frames": 21}}, "training.num_training_frames(21) % num_frame_per_block(8) = 5"),
        ({**DMD, "training": {**ROLLOUT, "min_num_training_frames": 40}}, "min_num_training_frames(40) > num_training_frames(32)"),
        ({**DMD, "training": ROLLOUT, "image_or_video_shape": [1, 24, 48, 44, 80]}, "num_training_frames(32) > image_or_video_shape[1](24)"),
        ({**DMD, "training": ROLLOUT, "backward_simulation": False}, "backward_simulation(false) noises films of the data"),
        ({**DMD, "training": {**ROLLOUT, "optimizer": "muon"}}, "optimizer(muon) with trainer score_distillation"),
        ({**DMD, "training": {**ROLLOUT, "text_dropout": 0.1}}, "training.text_dropout(0.1) with trainer score_distillation"),
        ({**DMD, "training": ROLLOUT, "adapter": {"rank": 4, "dropout": 0.1}}, "adapter.dropout(0.1) with trainer score_distillation"),
        ({**DMD, "training": ROLLOUT, "adapter": {"rank": 4, "alpha": 0}}, "adapter.alpha = 0"),
        ({**DMD, "training": ROLLOUT, "algorithm": {"context_noise": 2000}}, "algorithm.context_noise = 2000"),
        ({**OFF_POLICY, "denoising_step_list": [0]}, "names no step above 0"),
        ({**OFF_POLICY, "denoising_step_list": [1001, 0]}, "denoising_step_list(1001.0, 0.0) holds a step outside of 0 to 1000"),
        (
            {**DMD, "training": {**ROLLOUT, "streaming_frames": 64, "critic_reuses_rollout": True, "gradient_accumulation_steps": 2}},
            "gradient_accumulation_steps(2) with streaming_frames",
        ),
        *(
            ({**REGRESSION, **{name: REGRESSION.get(name, {}) | section}}, "regression_steps(9): teacher and student must read the same history")
            for name, section in (("training", {"visibility": "all"}), ("training", {"shot_offset": False}), ("algorithm", {"context_noise": 10.0}))
        ),
        ({**CHUNK8, "infra": {"sequence_parallel_size": 5}}, "[1](128) % (sequence_parallel_size(5) x num_frame_per_block(8)) = 8"),
    ],
)
def test_rules_across_keys_print_the_equation(source, equation):
    assert equation in refusal(source)


def test_regression_reads_what_generation_reads():
    assert load_config(REGRESSION).algorithm.regression_steps == 9
    unshifted = {**REGRESSION, "inference": {"multi_shot_rope_offset": 0.0}, "training": REGRESSION["training"] | {"shot_offset": False}}
    assert load_config(unshifted).algorithm.regression_steps == 9


def test_ranks_must_match_the_launch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "sp_size(4) x dp_size(1) = 4 != WORLD_SIZE(2)" in refusal({**CHUNK8, "sp_size": 4})
    assert load_config({**CHUNK8, "sp_size": 2}).sp_size == 2
    assert load_config(CHUNK8).sp_size == 1


def test_inert_keys_are_reported_once_with_a_reason(caplog):
    from longlive.core.log import warn_once

    warn_once.cache_clear()
    without = [key.removeprefix("infra.") for key in WITHOUT_EFFECT]
    source = {"inference": {"narrative_rope_phase_shift": 8}, "adapter": {"rank": 4, "dtype": "bf16"}, "infra": dict.fromkeys(without, "size")}
    config = load_config(source)
    load_config(source)
    assert config.adapter.rank == 4
    for key, reason in (WITHOUT_EFFECT | INERT).items():
        assert any(f"{key} is ignored: {reason}" in record.getMessage() for record in caplog.records), key
    assert len(caplog.records) == len(WITHOUT_EFFECT | INERT)


def test_documented_defaults():
    config = load_config({})
    assert config.model_kwargs.model_name == "Wan2.2-TI2V-5B" and config.model_kwargs.timestep_shift == 5.0
    assert (config.chunk_frames, config.inference.local_attn_size, config.inference.sink_size) == (1, -1, 0)
    assert config.inference.guidance_scale == 1.0 and config.data.scene_cut_prefix == "The scene transitions. "
    assert config.num_output_frames == 128 and config.adapter is None
    assert load_config({"adapter": {}}).adapter.fresh_rank == 16 and load_config({"adapter": {"rank": 64}}).adapter.fresh_rank == 64
    assert load_config({"adapter": None}).adapter is None


def test_overrides_are_yaml_typed_and_win(tmp_path):
    path = write(tmp_path, "model_kwargs: {num_frame_per_block: 8}\ninference: {sampling_steps: 4}\ntraining: {lr: 1e-4}\n")
    words = ["sampling_steps=2", "data.image_or_video_shape=[1, 64, 48, 12, 20]", "training.lr=3e-5", "vae_device=cuda:1", "adapter={rank: 8}"]
    config = load_config(path, words)
    assert (config.inference.sampling_steps, config.num_output_frames, config.training.lr) == (2, 64, 3e-5)
    assert config.inference.vae_device == "cuda:1" and config.adapter.rank == 8
    assert config.provenance["inference.sampling_steps"] == "override"
    assert config.provenance["model_kwargs.num_frame_per_block"] == str(path)
    assert config.provenance["training.beta2"] == "default"
    again = config.with_overrides(["adapter=null", "num_output_frames=16"])
    assert again.adapter is None and again.num_output_frames == 16 and again.inference.sampling_steps == 2
    assert config.num_output_frames == 64


@pytest.mark.parametrize("word", ["sampling_steps", "=3", "sampling_stepz=3", "inference.sampling_steps=[1"])
def test_bad_overrides_are_refused(word):
    assert word.partition("=")[0] in refusal({}, [word])


def test_tiny_brings_its_settings_but_a_file_wins():
    assert default_config().data.image_or_video_shape[3:] == (12, 20)
    config = load_config({"model_kwargs": {"model_name": "tiny", "local_attn_size": 24}, "sampling_steps": 2})
    assert config.chunk_frames == 8 and config.inference.local_attn_size == 24 and config.inference.sampling_steps == 2
    assert config.provenance["model_kwargs.num_frame_per_block"] == "preset tiny"


def test_omegaconf_objects_and_dicts_give_the_same(tmp_path):
    from omegaconf import OmegaConf

    text = """
        model_kwargs: {num_frame_per_block: 8}
        training: {lr: 1e-4, max_iters: 3}
        evaluation: {num_frames: [32, 96]}
        data: {data_path: "${output_folder}/x"}
        output_folder: a
    """
    path = write(tmp_path, text)
    config = load_config(OmegaConf.load(path))
    assert config.training.lr == 1e-4 and config.evaluation.num_frames == (32, 96) and config.data.data_path == "a/x"
    assert load_config(config) is config


def test_show_loads_back_to_the_same(tmp_path):
    config = load_config("configs/train_dmd.yaml", ["inference.negative_prompt='a: b # c'"])
    text = config_yaml(config)
    path = write(tmp_path, text)
    assert load_config(path).model_dump() == config.model_dump()
    assert "# configs/train_dmd.yaml" in text and "# override" in text
    changed = yaml.safe_load(config_yaml(config, changed=True))
    assert "beta2" not in changed["training"] and changed["adapter"]["rank"] == 128


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(Exception, match="frozen"):
        default_config().inference.sampling_steps = 3


def test_schema_table_has_a_line_and_a_meaning_for_every_key():
    lines = schema_table().splitlines()
    assert len(lines) == len(schema_keys())
    assert all(field.description for field in schema_keys().values())


def test_what_is_not_available_says_so():
    for source, purpose in (
        ({"trainer": "vae", "model_quant": True}, "train"),
        ({"trainer": "vae", "fp8_quant": True}, "train"),
        ({"adapter": {}}, "train"),
        ({"trainer": "vae", "adapter": {"rank": 4}}, "train"),
        ({"trainer": "vae", "training": {"error_recycling": {"enabled": True}}}, "train"),
        ({**CHUNK8, "trainer": "vae", "infra": {"sequence_parallel_size": 2}}, "train"),
        ({**FORCED, "real_score_quant": True}, "train"),
        ({**FORCED, "causal": False}, "train"),
        ({**FORCED, "num_train_timestep": 500}, "train"),
        ({"teacher_forcing": False}, "train"),
    ):
        with pytest.raises(NotAvailable, match="not available yet; "):
            availability(load_config(source), purpose)
    availability(load_config({"torch_compile": "auto"}), "generate")
    availability(default_config(), "generate")
    availability(load_config({**CHUNK8, "sp_size": 2}), "generate")
    availability(load_config(FORCED), "train")


def test_a_compiler_is_refused_with_the_reason():
    for source, purpose, reason in (({}, "generate", "fused by hand already"), (FORCED, "train", "training.compile: true compiles the blocks")):
        with pytest.raises(ConfigError, match=reason) as error:
            availability(load_config({**source, "torch_compile": True}), purpose)
        assert "not available yet" not in str(error.value) and "; set it to false" in str(error.value)


@pytest.mark.parametrize("trainer", ["diffusion", "vae"])
def test_what_only_distillation_reads_is_refused_elsewhere(trainer):
    values = {"real_score_mask": "causal", "fake_score_mask": "bidirectional", "real_score_ckpt": "a.pt", "fake_score_ckpt": "a.pt"}
    asked = [(section, key, plain) for section, keys in DISTILLATION_ONLY.items() for key, plain in keys.items()]
    assert len(asked) > 12
    for section, key, plain in asked:
        value = values.get(key, True if plain is False else 8)
        with pytest.raises(NotAvailable) as caught:
            availability(load_config({**CHUNK8, **FORCED, "trainer": trainer}, [f"{section}.{key}={value}"]), "train")
        assert f"distillation ({section}.{key}: " in str(caught.value) and f"of trainer {trainer} " in str(caught.value)
        availability(load_config({**CHUNK8, **FORCED, "trainer": trainer}, [f"{section}.{key}={'null' if plain is None else plain}"]), "train")


def test_a_short_shape_says_which_entry_is_missing():
    with pytest.raises(ConfigError, match=r"image_or_video_shape = \(1, 8, 48, 12\): entry number 5 is missing"):
        load_config({"data": {"image_or_video_shape": [1, 8, 48, 12]}})
