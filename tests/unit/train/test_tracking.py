"""Who hears of the rows of a run: TensorBoard where it is installed, Weights & Biases where a project is named and nobody disabled it."""

import sys
from types import SimpleNamespace

import pytest
import yaml
from train_toys import losses, shrink_tiny, training, write_vae

from longlive.cli import entry
from longlive.cli.app import run as command
from longlive.config import load_config
from longlive.models import spec
from longlive.train import RunOptions, run
from longlive.train.tracking import trackers, wandb_tracker

PROJECT = ["logging.wandb_project=longlive2", "logging.wandb_entity=us", "logging.wandb_key=secret", "logging.wandb_host=https://example.org"]
WORLD = ["data.data_path=null", "world.clips=2", "world.chunks=2", "training.max_iters=2"]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the library, which keeps what it is told."""
    told = SimpleNamespace(logins=[], runs=[], rows=[])
    told.login = lambda **how: told.logins.append(how)
    told.init = lambda **how: told.runs.append(how) or SimpleNamespace(log=lambda row, step: told.rows.append((step, row)))
    monkeypatch.setitem(sys.modules, "wandb", told)
    return told


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()


def test_a_run_tells_every_row_and_no_secret(tmp_path, wandb):
    config = load_config(training("", write_vae(tmp_path)), [*WORLD, *PROJECT])
    run(config, tmp_path / "run", RunOptions(save=False, wandb=True, wandb_dir=tmp_path / "files"))
    (about,) = wandb.runs
    assert (about["project"], about["entity"], about["name"], about["dir"]) == ("longlive2", "us", "run", str(tmp_path / "files"))
    assert wandb.logins == [{"key": "secret", "host": "https://example.org"}] and "secret" not in str(about["config"])
    assert about["config"]["training"]["max_iters"] == 2
    assert [step for step, _ in wandb.rows] == [1, 2]
    assert [row["loss"] for _, row in wandb.rows] == pytest.approx([loss for loss, _ in losses(tmp_path / "run")], abs=1e-6)


def test_files_of_a_run_hold_no_secret(tmp_path, wandb):
    run(load_config(training("", write_vae(tmp_path)), [*WORLD, *PROJECT]), tmp_path / "run", RunOptions(wandb=True))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "run.json"} <= {path.name for path in files} and wandb.logins
    assert not [path for path in files if b"secret" in path.read_bytes()]


def test_a_library_that_refuses_ends_the_command_with_one_line(tmp_path, wandb, capsys):
    def refuse(**how):
        raise RuntimeError("api_key not configured\nsecond line")

    wandb.init = refuse
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(training("", write_vae(tmp_path))))
    assert command(entry.train, ["--config_path", str(tmp_path / "config.yaml"), "--logdir", str(tmp_path / "run"), *WORLD, *PROJECT]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "longlive2 cannot be opened (api_key not configured)" in said and "--disable-wandb" in said


def test_the_flag_and_a_missing_project_keep_it_out(tmp_path, wandb):
    places = ["model_kwargs.model_name=tiny", "model_kwargs.num_frame_per_block=8", "algorithm.teacher_forcing=true", "data.image_or_video_shape=[1,16,48,2,4]"]
    words = [*places, f"checkpoints.vae_ckpt={write_vae(tmp_path)}", *WORLD, *PROJECT, "infra.gradient_checkpointing=false"]
    (tmp_path / "empty.yaml").write_text("{}\n")
    script = ["--config_path", str(tmp_path / "empty.yaml"), "--logdir", str(tmp_path / "run"), "--no_save"]
    assert command(entry.train, [*script, "--disable-wandb", *words]) == 0
    assert not wandb.runs and len(losses(tmp_path / "run")) == 2
    assert wandb_tracker(load_config({}), tmp_path, None) is None and not wandb.runs
    assert command(entry.train, [*script, *words]) == 0
    assert len(wandb.runs) == 1 and [step for step, _ in wandb.rows] == [1, 2]


def test_a_library_that_is_missing_is_said_once_and_rows_go_elsewhere(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    track = trackers(load_config({}, PROJECT), tmp_path, wandb=True)
    track({"step": 1, "loss": 0.5, "loss_0": float("nan")})
    assert caplog.text.count("wandb is not installed") == 1
    pytest.importorskip("tensorboard")
    assert list((tmp_path / "tensorboard").glob("events*"))
