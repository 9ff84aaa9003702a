"""Training from videos on two ranks that share every sample: the steps of one rank, in float32; and both ways of encoding a clip together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from train_toys import losses, shrink_tiny, training, write_vae

from longlive.config import load_config
from longlive.data.encoding import encode_frames
from longlive.data.samples import to_pixels
from longlive.models import spec
from longlive.models.light_vae import read_codec
from longlive.models.weights import read_state
from longlive.parallel.halo import encode_window, halo_windows
from longlive.parallel.mesh import Mesh
from longlive.train import RunOptions, run
from longlive.train.memory import training_memory
from longlive.train.shared_encode import encode_shared, whole_samples

CHANGES = [
    "algorithm.i2v=true", "data.image_or_video_shape=[1,32,48,2,4]", "data.allow_padding=true", "infra.gradient_checkpointing=true",
    "infra.sharding_strategy=hybrid_full", "training.batch_size=2", "training.noisy_copies=2", "training.gradient_accumulation_steps=2",
    "training.error_recycling.enabled=true", "training.error_recycling.max_size_per_bucket=4", "training.error_recycling.clean_prob=0.0",
    "training.beta1=0.9", "training.max_iters=2",
]  # fmt: skip
HALO = 3


def config(places, *changes):
    return load_config(training(*places), [*CHANGES, *changes])


def frames(batch, film):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 1 + 4 * (film - 1), 32, 32, 3), dtype=torch.uint8, generator=generator)


def on_two_ranks(places, folder):
    shrink_tiny()
    codec, mesh = read_codec(places[1], dtype=torch.float32), Mesh.launch(2, "cpu")
    latents = [encode_shared(codec, frames(batch, film), mesh, HALO) for batch, film in ((1, 16), (3, 6))]
    run(config(places, "infra.sequence_parallel_size=2"), folder / "shared")
    return latents


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    from longlive.cli.app import app
    from longlive.cli.app import run as command

    folder = tmp_path_factory.mktemp("ranks")
    assert command(app, ["world", "export", str(folder / "videos"), "--clips", "2", "--chunks", "2", "--max-shots", "2", "--seed", "1"]) == 0
    places = folder / "videos", write_vae(folder)
    return places, folder, run_ranks(on_two_ranks, 2, folder, places, folder)


def test_two_ranks_take_the_steps_of_one(shared, tmp_path):
    """Given frames, padding, the model's own errors, sharded parameters, one reduction after two micro-steps."""
    places, folder, _ = shared
    run(config(places), tmp_path, RunOptions(auto_resume=False, save=False))
    both = folder / "shared"
    for own, alone in zip(losses(both), losses(tmp_path), strict=True):
        assert own == pytest.approx(alone, rel=2e-5, abs=2e-6)
    weights, expected = (read_state(place / "raw-00001-of-00001.safetensors").tensors for place in (both, tmp_path))
    for parameter in expected:
        torch.testing.assert_close(weights[parameter], expected[parameter], rtol=1e-4, atol=2e-5, msg=lambda m: f"{parameter}: {m}")


def test_one_process_goes_on_where_two_ranks_stopped(shared, tmp_path):
    """Place in the data, error buffers of both ranks, optimizer and average: the steps of a run that never stopped."""
    places, folder, _ = shared
    shutil.copytree(folder / "shared", tmp_path / "on")
    longer = config(places, "training.max_iters=4")
    run(longer, tmp_path / "on")
    run(longer, tmp_path / "alone", RunOptions(auto_resume=False, save=False))
    on, alone = losses(tmp_path / "on"), losses(tmp_path / "alone")
    assert len(on) == len(alone) == 4 and on[:2] == losses(folder / "shared")
    for own, expected in zip(on, alone):
        assert own == pytest.approx(expected, rel=5e-4, abs=2e-5)
    rows = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    assert rows[3]["er_latent"] > 0 and rows[3]["er_entries"] > rows[1]["er_entries"]


@torch.no_grad()
def test_clips_are_encoded_together(shared):
    """One clip in windows, each after its halo; three clips whole, two of them on one rank."""
    places, _, ranks = shared
    codec, clip = read_codec(places[1], dtype=torch.float32), frames(1, 16)
    windows = halo_windows(16, 2, HALO)
    parts = [encode_window(codec, to_pixels(clip[:, w.raw_start : w.raw_end], "cpu"), w) for w in windows]
    for in_windows, whole in ranks:
        torch.testing.assert_close(in_windows, torch.cat(parts, dim=1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole, encode_frames(codec, frames(3, 6)), rtol=0, atol=0)


def test_the_cheaper_way_is_taken():
    assert not whole_samples(1, halo_windows(96, 4, 28)) and whole_samples(4, halo_windows(96, 4, 28))
    assert whole_samples(1, halo_windows(16, 2, 28))


def test_sharing_a_sample_divides_activations_and_sharding_states():
    def estimate(world, *changes):
        settings = load_config(training(Path("data"), Path("vae")), list(changes))
        return training_memory(settings, dims, 10**6, None, umt5=False, frames=16, world=world, mixed=False)

    from train_toys import DIT as dims

    alone, four = estimate(1), estimate(4, "infra.sequence_parallel_size=2", "infra.sharding_strategy=full")
    assert alone.states == 16e6 and four.states == 4e6 and four.activations == alone.activations / 2
    assert estimate(4, "infra.sharding_strategy=no_shard", "training.ema_weight=0.9").states == 20e6
    assert estimate(1, "infra.gradient_checkpointing=true").activations < alone.activations
