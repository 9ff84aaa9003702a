"""`infra.keep_attention`: recomputed blocks that do not attend again take the same steps, and their memory is counted."""

import pytest
import torch
from train_toys import DIT, losses, shrink_tiny, training, write_vae

import longlive.cache.attend as strategies
import longlive.train.diffusion as diffusion
from longlive.config import load_config
from longlive.core.errors import ConfigError
from longlive.models import spec
from longlive.models.weights import read_state
from longlive.train import RunOptions, run
from longlive.train.memory import MARGIN, training_memory

WORLD = ["data.data_path=null", "world.clips=2", "world.chunks=3", "world.max_shots=2", "infra.gradient_checkpointing=true", "training.noisy_copies=2"]


def trained(folder, vae, *changes):
    config = load_config(training(folder, vae), [*WORLD, *changes])
    run(config, folder, RunOptions(auto_resume=False, save=False))
    return losses(folder), read_state(folder / "raw-00001-of-00001.safetensors").tensors


def test_steps_are_bit_for_bit_the_same_and_attention_runs_once(tmp_path, monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()
    for module in (strategies, diffusion):
        monkeypatch.setattr(module, "part_kernel", lambda sample: "math")
    computed, real = [], strategies.film_attention

    def counted(*args, read=None, **options):
        computed.append(read is None)
        return real(*args, read=read, **options)

    monkeypatch.setattr(strategies, "film_attention", counted)
    vae, found = write_vae(tmp_path), {}
    for asked, whole, again in ((0, 0, 2 * DIT.layers), (1, 0, 2 * DIT.layers - 1), ("auto", 0, DIT.layers), (0, 1, 2 * DIT.layers - 1), (5, 1, DIT.layers)):
        computed.clear()
        name = f"{asked}-{whole}"
        found[name] = trained(tmp_path / name, vae, f"infra.keep_attention={asked}", f"infra.keep_blocks={whole}", "training.max_iters=2")
        assert sum(computed) == 4 * again, name  # two steps after two batches to warm up
    (rows, weights), *others = found.values()
    for same_rows, same in others:
        assert same_rows == rows
        assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


def test_what_is_kept_is_counted_and_auto_leaves_room():
    def estimate(*changes, card=1e12):
        config = load_config(training("data", "vae"), ["infra.gradient_checkpointing=true", *changes])
        return training_memory(config, DIT, 10**6, None, umt5=False, frames=16, world=1, mixed=True, card=card)

    none, one = estimate("infra.keep_attention=0"), estimate("infra.keep_attention=1")
    assert one.peak - none.peak == one.read == 2 * 16 * 2 * (2 * DIT.dim + 4 * DIT.heads)
    assert none.kept == 0 and estimate().kept == estimate("infra.keep_attention=100").kept == DIT.layers
    assert estimate(card=MARGIN * none.peak + 1.5 * none.read).kept == 1 and estimate(card=MARGIN * none.peak).kept == 0
    whole = estimate("infra.keep_attention=0", "infra.keep_blocks=1")
    assert whole.peak > none.peak and estimate("infra.keep_attention=9", "infra.keep_blocks=1").kept == DIT.layers - 1
    assert estimate("infra.keep_blocks=99").peak == estimate("infra.gradient_checkpointing=false").peak
    assert estimate(card=None).kept == estimate("infra.gradient_checkpointing=false").kept == 0
    assert any(line.startswith("kept attention of 1 blocks") for line in one.lines())


@pytest.mark.parametrize("seen", ["all", "window"])
def test_what_a_window_copies_is_said_not_to_be_counted(seen):
    config = load_config(training("data", "vae"), [f"training.visibility={seen}"])
    estimate = training_memory(config, DIT, 10**6, None, umt5=False, frames=16, world=1, mixed=True)
    assert any("not counted: the keys and values that visibility: window copies" in line for line in estimate.lines()) == (seen == "window")


@pytest.mark.parametrize("value", ["-1", "all", "1.5"])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match="keep_attention"):
        load_config(training("data", "vae"), [f"infra.keep_attention={value}"])


def test_where_it_cannot_act_it_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()
    trained(tmp_path, write_vae(tmp_path), "infra.keep_attention=2", "training.max_iters=1")
    assert "infra.keep_attention does nothing here" in caplog.text
