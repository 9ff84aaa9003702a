"""Evaluation while training: films, held-out loss and scores from a copy of the weights; the training beside it does not notice."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from longlive.config import load_config
from longlive.core.errors import ConfigError, InputError
from longlive.data import sources
from longlive.diffusion.flow import train_table
from longlive.models import spec
from longlive.models.codec import VideoCodec
from longlive.models.spec import DiTDims, VAEDims
from longlive.models.vae_fp8 import Fp8Conv
from longlive.models.wan_dit import WanDiT
from longlive.models.wan_vae import WHOLE_FRAME, WanVAE
from longlive.train import evaluate
from longlive.train.compiled import checkpoint_blocks
from longlive.train.evaluate import Evaluator
from longlive.train.objective import flow_target, frame_errors
from longlive.train.teacher_forcing import Film, frame_positions, teacher_forced_velocity
from longlive.train.validation import VideoHeldOut
from longlive.world.judge import ATTRIBUTES

DIT = DiTDims(dim=32, ffn=64, layers=1, heads=2, text_dim=20, text_len=64)
TINY = {
    "model_kwargs": {"model_name": "tiny", "num_frame_per_block": 8},
    "algorithm": {"trainer": "diffusion", "teacher_forcing": True},
    "data": {"image_or_video_shape": [1, 16, 48, 2, 4]},
    "world": {"clips": 2, "chunks": 2, "max_shots": 2},
    "inference": {"sampling_steps": 1, "device": "cpu", "dtype": "float32"},
    "evaluation": {"interval": 2, "val_batch_size": 2},
    "training": {"min_loss_weight": 0.4},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", replace(spec.TINY, dit=DIT))
    monkeypatch.setattr(evaluate, "FILMS", 2)
    monkeypatch.setattr("longlive.train.validation.CLIPS", 2)


def network(seed=0):
    torch.manual_seed(seed)
    dit = WanDiT(DIT)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    return dit


def codec():
    torch.manual_seed(7)
    return VideoCodec(WanVAE(VAEDims(encoder_base=4, decoder_base=4)).eval().requires_grad_(False), torch.zeros(1, 48), torch.ones(1, 48), group=2)


def evaluator(folder, overrides=(), **parts):
    return Evaluator(load_config(TINY, list(overrides)), folder, torch.device("cpu"), **{"codec": codec(), **parts})


def training_step(dit, optimizer, number):
    """One step of teacher forcing whose noise comes from the global generator, with compiled and recomputed blocks, under autocast."""
    clean = torch.randn(1, 4, 48, 2, 4, generator=torch.Generator().manual_seed(number))
    flow = flow_target(clean, torch.randn_like(clean), torch.randint(1000, (1, 2)), train_table(5.0))
    film = Film(torch.arange(2)[None], frame_positions([[False, False]], 2, 0.0))
    text = dit.text([torch.randn(5, 20), torch.randn(9, 20)])
    (velocity,) = teacher_forced_velocity(dit, text, film, (clean, torch.zeros(1, 4, dtype=torch.float64)), [(flow.noisy_BFCHW, flow.sigma_BF)])
    frame_errors(velocity, flow.target_BFCHW).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def two_steps(between):
    torch._dynamo.reset()
    dit = network().train()
    checkpoint_blocks(dit.blocks)
    for block in dit.blocks:
        block.compile(backend="eager")
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-2)
    random.seed(3), np.random.seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        training_step(dit, optimizer, 1)
        graphs = dict(torch._dynamo.utils.counters["stats"])
        between(dit)
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() and dit.training
        assert all(p.requires_grad and p.grad is None for p in dit.parameters())
        assert dict(torch._dynamo.utils.counters["stats"]) == graphs
        training_step(dit, optimizer, 2)
    return [*dit.parameters(), torch.get_rng_state(), torch.tensor([random.random(), np.random.rand()], dtype=torch.float64)]


def test_the_next_training_step_does_not_notice(tmp_path, monkeypatch):
    """Whatever runs in between: films of other shapes, prompts and batches must not change what a step computes (spec training §9.1, D1)."""
    monkeypatch.setattr(evaluate.Judge, "read", lambda *_: None)  # reading takes seconds; making the judge draws from the global generator
    monkeypatch.setattr(evaluate, "score_film", lambda *_: dict.fromkeys(ATTRIBUTES, 0.5))
    columns = {}
    e = evaluator(tmp_path, codec=None)
    alone = two_steps(lambda dit: None)
    beside = two_steps(lambda dit: columns.update(e.run(dit, {}, 2)))
    assert columns["val_loss"] > 0 and list(tmp_path.rglob("*.mp4"))
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def test_what_the_device_cannot_decode_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("longlive.engine.parts.fp8_tiles_lack", lambda device: "its kernels are for other cards")
    refused, plain = (evaluator(tmp_path, [f"inference.vae_fp8={fp8}"]) for fp8 in ("true", "false"))
    refused.check()  # a CPU needs none
    refused.device = plain.device = torch.device("cuda")
    plain.check()
    with pytest.raises(ConfigError, match=r"inference.vae_fp8: true cannot run on cuda: its kernels .* set inference.vae_fp8: false"):
        refused.check()


@pytest.mark.parametrize(("setting", "rows", "eight"), [("vae_tile_rows=1", 1, False), ("vae_fp8=true", None, True)])
def test_films_are_decoded_as_configured(tmp_path, monkeypatch, setting, rows, eight):
    monkeypatch.setattr(evaluate.Judge, "load", lambda *_: None)
    monkeypatch.setattr(evaluate, "held_out", lambda *_: None)
    e = evaluator(tmp_path, [f"inference.{setting}"])
    e._prepare()
    vae = e.codec.vae
    assert rows == (None if vae.spatial is WHOLE_FRAME else vae.spatial.latent_rows) and eight == any(isinstance(part, Fp8Conv) for part in vae.modules())


def test_films_and_numbers_of_both_sets_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "FILMS", 1)
    e = evaluator(tmp_path, ["evaluation.use_ema=true"])
    found = e.run(network(), dict(network(1).named_parameters()), 2)
    names = ["val_loss", *(f"val_loss_{q}" for q in range(4)), *(f"judge_{name}" for name in ATTRIBUTES)]
    assert set(found) == {*names, *(name + "_ema" for name in names), "eval_seconds"}
    assert found["val_loss"] != found["val_loss_ema"] and all(0 <= found[name] <= 1 for name in names if name.startswith("judge"))
    files = {path.name for path in (tmp_path / "evaluation" / "step_000002").iterdir()}
    assert files == {"film_000.mp4", "film_000_ema.mp4", "film_000_prompts.txt"}
    later = e.run(network(1), {}, 4)
    assert later == {name: found[name + "_ema"] for name in names} | {"eval_seconds": later["eval_seconds"]}
    films = [tmp_path / "evaluation" / name for name in ("step_000002/film_000_ema.mp4", "step_000004/film_000.mp4", "step_000002/film_000.mp4")]
    assert films[0].read_bytes() == films[1].read_bytes() != films[2].read_bytes()


def test_the_held_out_loss_is_that_of_fixed_noise_at_fixed_levels(tmp_path):
    """A network that always answers 0 errs by the square of its target; each quarter has its own levels, and weights are those of training."""
    e = evaluator(tmp_path)
    e._prepare()
    dit = network()
    torch.nn.init.zeros_(dit.head.head.weight), torch.nn.init.zeros_(dit.head.head.bias)
    columns = e.validation.columns(e.validation.sums(dit, e.encoder, e.clips))
    power = torch.stack([clip.latents_FCHW.square().mean() for clip in e.clips]).mean().item()
    assert all(columns[f"val_loss_{q}"] == pytest.approx(1 + power, rel=0.05) for q in range(4))
    assert columns["val_loss"] == pytest.approx((1 + power) * e.validation.table.weights.mean().item(), rel=0.15)
    for q, entries in enumerate(e.validation.entries):
        assert (train_table(5.0).sigmas[entries] * 4).floor().clamp(max=3).unique().tolist() == [q]
    assert sum(map(len, e.validation.entries)) == 1000
    parts = [e.validation.sums(dit, e.encoder, [clip]) for clip in e.clips]
    assert torch.equal(sum(parts), e.validation.sums(dit, e.encoder, e.clips))
    padded = [replace(clip, valid=8) for clip in e.clips]
    assert e.validation.sums(dit, e.encoder, padded)[0, 2] == sum(len(clip.latents_FCHW) for clip in e.clips) / 2


def test_held_out_stories_are_not_those_of_training(tmp_path):
    from longlive.world.vocabulary import held_out as is_held_out

    e = evaluator(tmp_path)
    plans = e._plans()
    shown = [role.character for plan in plans for shot in plan.story.shots for role in shot.roles]
    assert shown and all(is_held_out(character.shape, character.colour) for character in shown)
    assert [plan.chunks for plan in plans] == [2, 2]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball rolls\na blue box jumps\na green cone\n")
    return path


def films_of(folder, ending):
    return sorted(path.name for path in folder.rglob(f"film_*{ending}"))


def test_prompts_of_a_file_are_filmed_and_nothing_is_judged(tmp_path, prompts):
    e = evaluator(tmp_path, [f"data.eval_data_path={prompts}", "data.data_path=/nowhere", "evaluation.num_frames=[16,8]"])
    assert set(e.run(network(), {}, 2)) == {"eval_seconds"}
    assert films_of(tmp_path, ".mp4") == [f"film_00{i}_{frames}f.mp4" for i in range(3) for frames in (16, 8)]
    of_training_data = evaluator(tmp_path, [f"data.data_path={prompts}"])
    assert len(of_training_data._plans()) == 2


def test_without_a_video_library_films_are_contact_sheets(tmp_path, prompts, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    evaluator(tmp_path, [f"data.eval_data_path={prompts}", "data.data_path=/nowhere"]).run(network(), {}, 2)
    assert films_of(tmp_path, ".png") == ["film_000.png", "film_001.png", "film_002.png"] and not films_of(tmp_path, ".mp4")
    page = np.asarray(Image.open(tmp_path / "evaluation" / "step_000002" / "film_000.png"))
    assert page.shape == (32, 128, 3) and page.std() > 1


def test_latents_instead_of_films(tmp_path, prompts):
    given = [f"data.eval_data_path={prompts}", "data.data_path=/nowhere", "evaluation.save_latents_only=true"]
    evaluator(tmp_path, given).run(network(), {}, 2)
    saved = torch.load(tmp_path / "evaluation" / "step_000002" / "film_001.pt", weights_only=True)
    assert saved.shape == (16, 48, 2, 4) and not films_of(tmp_path, ".mp4")


def test_the_loss_on_a_folder_of_held_out_videos(tmp_path, monkeypatch, caplog):
    from longlive.engine.sinks import Mp4Sink

    for name, frames in (("a", 61), ("b", 40)):
        (tmp_path / "set" / "video" / name).mkdir(parents=True), (tmp_path / "set" / "caption" / name).mkdir(parents=True)
        sink = Mp4Sink(tmp_path / "set" / "video" / name / "0.mp4")
        sink.write(torch.randint(256, (frames, 32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(frames)))
        sink.close()
        (tmp_path / "set" / "caption" / name / "0.json").write_text('{"caption": "noise"}')
    e = evaluator(tmp_path, [f"data.eval_data_path={tmp_path / 'set'}", "data.data_path=/nowhere", "data.allow_padding=true", "data.min_latent_frames=8"])
    columns = e.run(network(), {}, 2)
    assert [clip.valid for clip in e.clips] == [16, 8] and columns["val_loss"] > 0
    assert {path.name for path in tmp_path.rglob("film_*.mp4")} == {"film_000.mp4", "film_001.mp4"}

    def damaged(path, *where):
        if path.parent.name == "b":
            raise InputError("cut off")
        return read(path, *where)

    read = sources.read_frames
    monkeypatch.setattr(sources, "read_frames", damaged)
    (tmp_path / "set" / "video" / "a" / "1.mp4").write_bytes(b"no video")
    (tmp_path / "set" / "caption" / "a" / "1.json").write_text('{"caption": "noise"}')
    held = VideoHeldOut(e.config, tmp_path / "set")
    assert [clip.valid for clip in (held.clip(number, e.codec) for number in range(2)) if clip] == [16, 16]
    assert "broken held-out clip video/b/0.mp4 (cut off)" in caplog.text and "broken held-out clip video/a/1.mp4" in caplog.text


def test_when_evaluations_are_due(tmp_path):
    e = evaluator(tmp_path)
    assert [step for step in range(7) if e.due(step)] == [2, 4, 6]
    assert not any(evaluator(tmp_path, [f"evaluation.interval={never}"]).due(2) for never in (0, -1))


def test_a_film_that_cannot_be_written_leaves_nothing_half(tmp_path, prompts):
    (tmp_path / "evaluation" / "step_000002" / "film_001.mp4").mkdir(parents=True)
    with pytest.raises(InputError, match="film_001.mp4"):
        evaluator(tmp_path, [f"data.eval_data_path={prompts}", "data.data_path=/nowhere"]).run(network(), {}, 2)
    assert not list(tmp_path.rglob("*.tmp"))
