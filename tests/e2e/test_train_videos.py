"""Training from the documented layout: real videos and captions, shards of them, padding, image to video, the 5B model's places, a dry run."""

import json

import documented_places
import pytest
import torch
import yaml
from train_toys import DIT, losses, shrink_tiny, training, write_vae

from longlive.cli import entry
from longlive.cli.app import app
from longlive.cli.app import run as command
from longlive.config import load_config
from longlive.core.errors import ConfigError, InputError, LongLiveError
from longlive.data.shards import read_index
from longlive.models import spec
from longlive.models.weights import read_state
from longlive.parallel.mesh import Mesh
from longlive.train import RunOptions, rehearse, run
from longlive.train.diffusion import DiffusionTask
from longlive.train.trainer import Draw
from longlive.train.video_clips import VideoClips

FRESH = RunOptions(auto_resume=False, save=False)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(videos, VAE): two stories of two chunks, one of them of one shot."""
    root = tmp_path_factory.mktemp("set")
    assert command(app, ["world", "export", str(root / "videos"), "--clips", "2", "--chunks", "2", "--max-shots", "2", "--seed", "1"]) == 0
    return root / "videos", write_vae(root)


def draw(step=0, micro=0):
    return Draw(torch.Generator().manual_seed(step), torch.Generator().manual_seed(step), 0.0, step, micro)


def test_shards_train_like_the_videos_they_were_made_of(places, tmp_path):
    config = training(*places, algorithm={"trainer": "diffusion", "teacher_forcing": True, "i2v": True}, training={"gradient_accumulation_steps": 2})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert command(app, ["encode", str(places[0]), str(tmp_path / "shards"), "--config", str(tmp_path / "config.yaml"), "--passes", "3"]) == 0
    run(load_config(config), tmp_path / "videos", FRESH)
    run(load_config(config, [f"data.data_path={tmp_path / 'shards'}", "data.load_raw_video=false"]), tmp_path / "from_shards", FRESH)
    assert losses(tmp_path / "videos") == losses(tmp_path / "from_shards")
    assert len(set(losses(tmp_path / "videos"))) == 3
    assert len(read_index(tmp_path / "shards").samples) == 2


def test_a_resumed_run_goes_on_in_the_data_where_it_stopped(places, tmp_path):
    config = load_config(training(*places, training={"log_iters": 2, "max_iters": 4}), ["logging.seed=0"])
    run(config.with_overrides(["training.max_iters=2"]), tmp_path)
    seed = yaml.safe_load((tmp_path / "config.yaml").read_text())["logging"]["seed"]
    run(config, tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["logging"]["seed"] == seed > 0
    run(config.with_overrides([f"logging.seed={seed}"]), tmp_path / "whole")
    assert losses(tmp_path) == losses(tmp_path / "whole") and len(losses(tmp_path)) == 4
    pytest.importorskip("tensorboard")
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_padding_carries_no_loss_and_a_given_frame_neither(places):
    changes = ["data.image_or_video_shape=[1,32,48,2,4]", "data.allow_padding=true", "algorithm.i2v=true", "training.visibility=window"]
    task = DiffusionTask(load_config(training(*places), changes), CPU, Mesh())
    task.module.head.head.weight.data.normal_(std=0.1)
    batch = task.batch(draw())
    (flow,) = batch.copies
    assert flow.mask_BF[0].tolist() == [0.0] + [1.0] * 15 + [0.0] * 16
    assert flow.sigma_BF[0, 0] == 0 and torch.equal(flow.noisy_BFCHW[:, 0], batch.context[0][:, 0])
    loss = task.loss(batch)[0]
    flow.target_BFCHW[:, 16:] += 100
    assert task.loss(batch)[0] == loss
    flow.target_BFCHW[:, 15] += 100
    assert task.loss(batch)[0] > loss + 1


def test_positions_and_prompts_follow_the_cuts_of_the_files(places):
    config = load_config(training(*places), ["training.shot_offset=true", "inference.multi_shot_rope_offset=8.0"])
    task, found = DiffusionTask(config, CPU, Mesh()), set()
    for step in range(2):
        clips = task.clips.draw(draw(step))
        film, _ = task._film(clips, draw(step))
        jump = (film.position_BF[0, 8] - film.position_BF[0, 7]).item()
        found.add((jump, clips.prompts[0][1].startswith(config.data.scene_cut_prefix), clips.cuts[0][1]))
    assert found == {(9.0, True, True), (1.0, False, False)}


def test_the_documented_commands_train_the_model_in_its_documented_places(places, tmp_path, monkeypatch, capsys):
    documented_places.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    over = [f"data.data_path={places[0]}", "data.image_or_video_shape=[1,16,48,4,4]", "infra.sequence_parallel_size=1", "training.max_iters=2"]
    over += ["model_num_heads=2", "data.num_workers=1"]
    (tmp_path / "held_out").symlink_to(places[0])
    films = ["data.eval_data_path=held_out", "evaluation.interval=2", "evaluation.num_frames=8", "evaluation.use_ema=false", "inference.sampling_steps=1"]
    configs = documented_places.ROOT / "configs"
    flags = ["--wandb-save-dir", "wandb", "--disable-wandb", "--no-auto-resume"]
    assert command(entry.train, ["--config_path", str(configs / "train_i2v_ar.yaml"), "--logdir", "logs/i2v", *flags, *over, *films]) == 0
    assert len(losses(tmp_path / "logs/i2v")) == 2
    (row,) = [json.loads(line) for line in (tmp_path / "logs/i2v/evaluations.jsonl").read_text().splitlines()]
    assert row["step"] == 2 and row["val_loss"] > 0 and len(list((tmp_path / "logs/i2v/evaluation/step_000002").glob("film_*.mp4"))) == 2
    trained = read_state(tmp_path / "logs/i2v/raw-00001-of-00001.safetensors").tensors
    start = read_state(tmp_path / "wan_models/Wan2.2-TI2V-5B/diffusion_pytorch_model.safetensors").tensors
    assert trained.keys() == start.keys() and all(t.dtype == torch.float32 for t in trained.values())
    moved = max((trained[name] - start[name].float()).abs().max().item() for name in start)
    assert 0 < moved < 1e-3  # two steps of 1e-5 from the base model, not a fresh network

    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert command(entry.train, ["--config_path", str(configs / "train_ar.yaml"), "--logdir", "logs/ar", "--dry-run", *over, *films]) == 0
    report = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    expected = ["2 folders of", "16 latent frames = 61 frames of 64 x 64, 2 chunks", "1 = dp 1 x sp 1", "weights, gradients, optimizer, EMA", "one step"]
    for words in expected:
        assert words in report, report


def test_what_cannot_be_trained_is_refused_in_one_line(places, tmp_path, monkeypatch):
    def refused(kind, words, *changes, sections=None):
        with pytest.raises(kind, match=words):
            run(load_config(training(*places, **(sections or {})), list(changes)), tmp_path / "out", FRESH)

    refused(ConfigError, r"character_weight\(3.0\) needs to know where characters are", "training.character_weight=3.0")
    refused(InputError, "no folder fills", "data.image_or_video_shape=[1,64,48,2,4]")
    refused(InputError, "the VAE nowhere.pth is missing", "checkpoints.vae_ckpt=nowhere.pth")
    refused(InputError, "nowhere.pt", "checkpoints.generator_ckpt=nowhere.pt")
    monkeypatch.chdir(tmp_path)
    base = ["model_kwargs.model_name=Wan2.2-TI2V-5B", "model_kwargs.num_frame_per_block=8"]
    refused(InputError, "wan_models/Wan2.2-TI2V-5B", *base)
    refused(InputError, "data.data_path is not set", *base, "data.data_path=null")
    refused(InputError, "nowhere.txt", "evaluation.interval=100", "data.eval_data_path=nowhere.txt")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").write_text("")
    refused(InputError, "is not a folder.*--logdir")
    with pytest.raises(InputError, match="a dry run is for trainers diffusion and score_distillation, not vae"):
        rehearse(load_config({"model_kwargs": {"model_name": "tiny"}, "algorithm": {"trainer": "vae"}}))
    with pytest.raises(InputError, match=r"sequence parallelism .* of trainer vae"):
        run(load_config({"algorithm": {"trainer": "vae"}, "model_kwargs": {"model_name": "tiny"}, "infra": {"sequence_parallel_size": 2}}), tmp_path, FRESH)
    assert command(app, ["train", "none.yaml"]) == 2


def test_shards_of_another_text_encoder_are_refused(places, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(training(*places)))
    assert command(app, ["encode", str(places[0]), str(tmp_path / "shards"), "--config", str(tmp_path / "config.yaml")]) == 0
    index = json.loads((tmp_path / "shards/index.json").read_text())
    assert (index["text"]["text_dim"], index["text"]["text_len"]) == (DIT.text_dim, DIT.text_len)
    index["text"]["text_dim"] = 40
    (tmp_path / "shards/index.json").write_text(json.dumps(index))
    config = load_config(training(*places), [f"data.data_path={tmp_path / 'shards'}", "data.load_raw_video=false"])
    with pytest.raises(InputError, match="are 40 x 64, the model reads 20 x 64"):
        DiffusionTask(config, CPU, Mesh())


class Split(Mesh):
    """Two ranks, of which the other one always holds something else."""

    def sum(self, tensor):
        return tensor

    def gather(self, tensor):
        return torch.stack((tensor, tensor + 1))


def test_ranks_that_read_different_samples_say_so(places):
    clips = VideoClips(load_config(training(*places)), spec.MODELS["tiny"], CPU, Split(sp_size=2))
    with pytest.raises(LongLiveError, match="ranks that share a sample read different ones"):
        clips.draw(draw())
