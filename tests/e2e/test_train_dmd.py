"""The documented distillation, text and image to video, with models in their documented places: from train.py to a film of inference.py."""

import json

import documented_places
import pytest
import torch
from safetensors.torch import load_file, save_file

from longlive.cli import entry
from longlive.cli.app import run as command
from longlive.models.lora_files import read_lora
from longlive.train import checkpoint

CONFIGS = documented_places.ROOT / "configs"
SMALL = [
    "checkpoints.generator_ckpt=LongLive-2.0-5B/model_bf16.pt", "data.image_or_video_shape=[1,16,48,4,4]", "model_num_heads=2", "adapter.rank=4",
    "adapter.alpha=4", "training.min_num_training_frames=16", "training.num_training_frames=16", "training.slice_last_frames=16", "training.max_iters=2",
    "training.log_iters=2", "training.dfake_gen_update_ratio=1", "inference.sampling_steps=2", "training.ema_weight=0", "training.lr=1e-2",
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    documented_places.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(config, *words, logdir="logs"):
    script = ["--config_path", str(CONFIGS / config), "--logdir", logdir, "--wandb-save-dir", "wandb", "--disable-wandb"]
    return command(entry.train, [*script, *SMALL, *words])


def rows(folder):
    return [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_prompts_become_a_lora_that_generates(here, capsys):
    (here / "prompts.txt").write_text("a red circle bounces\na silver robot walks through clean lab\n")
    evaluated = ["evaluation.interval=2", "evaluation.num_frames=[8,16]", "data.eval_data_path=prompts.txt"]
    assert trained("train_dmd.yaml", "data.data_path=prompts.txt", *evaluated) == 0, capsys.readouterr().err
    assert [sorted(row) for row in rows(here)] == [sorted(rows(here)[0])] * 2 and {"loss", "critic_loss"} <= rows(here)[0].keys()
    films = {path.name for path in (here / "logs" / "evaluation" / "step_000002").glob("film_*.mp4")}
    assert films == {f"film_00{film}_{frames}f.mp4" for film in (0, 1) for frames in (8, 16)}
    (place,) = checkpoint.folders(here / "logs")
    student = read_lora(here / "logs" / "lora.pt")
    assert student.rank == 4 and len(student.layers) == 20 and any(layer.b_OR.abs().max() > 0 for layer in student.layers.values())
    assert read_lora(place).layers.keys() == read_lora(here / "logs" / "lora.pt", entry="critic_lora").layers.keys()
    words = ["data.data_path=prompts.txt", "inference_iter=0", "inference.sampling_steps=1", "adapter.rank=4", "output_folder=videos"]
    for lora in ("logs/lora.pt", "logs/lora"):
        assert command(entry.inference, ["--config_path", "configs/inference.yaml", "--overwrite", *words, f"checkpoints.lora_ckpt={lora}"]) == 0
    assert len(list((here / "videos").glob("*.mp4"))) == 1


def test_a_lora_trained_from_the_base_model_serves_the_ar_model(here, capsys):
    """It is another one than from the AR model with the same seed, and the AR model's film with it is another one than without."""
    (here / "prompts.txt").write_text("a red circle bounces\n")
    weights = here / "wan_models" / "Wan2.2-TI2V-5B" / "diffusion_pytorch_model.safetensors"  # a head of zeros would teach nothing
    save_file({name: tensor + 0.05 * torch.randn(tensor.shape).bfloat16() for name, tensor in load_file(weights).items()}, weights)
    once = ["data.data_path=prompts.txt", "evaluation.interval=0", "training.max_iters=1", "logging.seed=3"]
    assert trained("train_dmd.yaml", *once, "checkpoints.generator_ckpt=null") == 0, capsys.readouterr().err
    assert trained("train_dmd.yaml", *once, logdir="from_ar") == 0, capsys.readouterr().err
    base, ar = (read_lora(here / folder / "lora.pt").layers for folder in ("logs", "from_ar"))
    assert base.keys() == ar.keys() and any(not torch.equal(base[name].b_OR, ar[name].b_OR) for name in base)
    words = ["data.data_path=prompts.txt", "inference_iter=0", "inference.sampling_steps=1", "save_latents_only=true"]
    films = []
    for folder, lora in (("with", ["adapter.rank=4", "checkpoints.lora_ckpt=logs/lora.pt"]), ("without", ["adapter=null", "checkpoints.lora_ckpt=null"])):
        assert command(entry.inference, ["--config_path", "configs/inference.yaml", "--overwrite", *words, *lora, f"output_folder={folder}"]) == 0
        (made,) = (here / folder).glob("*.pt")
        films.append(torch.load(made, weights_only=True).float())
    assert films[0].shape == films[1].shape and (films[0] - films[1]).abs().max() > 1e-3


def test_first_frames_of_videos_are_given(here, capsys):
    from longlive.engine.sinks import Mp4Sink

    for name in ("video", "caption"):
        (here / "films" / name / "one").mkdir(parents=True)
    sink = Mp4Sink(here / "films" / "video" / "one" / "0.mp4")
    sink.write(torch.randint(0, 255, (61, 64, 64, 3), dtype=torch.uint8))
    sink.close()
    (here / "films" / "caption" / "one" / "0.json").write_text('{"caption": "a robot"}')
    words = ["data.data_path=films", "data.num_workers=0", "data.allow_padding=true", "evaluation.interval=0"]
    assert trained("train_i2v_dmd.yaml", *words) == 0, capsys.readouterr().err
    assert len(rows(here)) == 2 and all(row["critic_loss"] > 0.1 for row in rows(here))
    off_policy = [*words, "algorithm.backward_simulation=false", "training.max_iters=3"]
    assert trained("train_i2v_dmd.yaml", *off_policy) == 0, capsys.readouterr().err
    assert [row["step"] for row in rows(here)] == [1, 2, 3]


def test_what_cannot_be_distilled_is_refused_in_one_line(here, capsys):
    (here / "prompts.txt").write_text("a red circle\n")
    for words, said in (
        (["training.num_training_frames=20"], "training.num_training_frames(20) % num_frame_per_block(8) = 4"),
        (["data.data_path=nowhere.txt"], "nowhere.txt"),
        (["data.data_path=prompts.txt", "checkpoints.generator_ckpt=nowhere.pt"], "nowhere.pt"),
        (["data.data_path=prompts.txt", "checkpoints.fake_score_ckpt=nowhere.pt"], "nowhere.pt"),
    ):
        assert trained("train_dmd.yaml", "evaluation.interval=0", *words) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "Traceback" not in error and not (here / "logs").exists()
