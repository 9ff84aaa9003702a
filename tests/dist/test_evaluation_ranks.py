"""Evaluation over 2 ranks: shared out, the same numbers as of one rank, and a wait that outlasts the group's own time limit."""

import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from longlive.config import load_config
from longlive.models import spec
from longlive.models.codec import VideoCodec
from longlive.models.spec import DiTDims, VAEDims
from longlive.models.wan_dit import WanDiT
from longlive.models.wan_vae import WanVAE
from longlive.parallel.fsdp import is_sharded, shard_mesh, shard_parameters
from longlive.parallel.mesh import Mesh
from longlive.train import evaluate, validation
from longlive.train.evaluate import Evaluator
from longlive.world.judge import ATTRIBUTES

DIT = DiTDims(dim=32, ffn=64, layers=1, heads=2, text_dim=20, text_len=64)
CONFIG = {
    "model_kwargs": {"model_name": "tiny", "num_frame_per_block": 8},
    "data": {"image_or_video_shape": [1, 8, 48, 2, 4]},
    "world": {"chunks": 1, "max_shots": 1},
    "inference": {"sampling_steps": 1, "device": "cpu", "dtype": "float32"},
    "evaluation": {"interval": 1},
}
LIMIT = 5.0


def numbers(folder, mesh, shard):
    spec.MODELS["tiny"] = replace(spec.TINY, dit=DIT)
    evaluate.FILMS, validation.CLIPS = 2, 3
    evaluate.Judge.read = lambda judge, frames, starts: frames.float().std()  # the real judge takes seconds
    evaluate.score_film = lambda reading, story: dict.fromkeys(ATTRIBUTES, reading / 255)
    torch.manual_seed(0)
    dit, vae = WanDiT(DIT), WanVAE(VAEDims(encoder_base=4, decoder_base=4)).eval().requires_grad_(False)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    if shard:
        shard_parameters(dit, shard_mesh("full", "cpu"), units=dit.blocks, entries=[dit.text_embedding])
    codec = VideoCodec(vae, torch.zeros(1, 48), torch.ones(1, 48), group=2)
    evaluator = Evaluator(load_config(CONFIG), folder, torch.device("cpu"), mesh, codec=codec)
    if mesh.dp_rank:
        time.sleep(LIMIT + 1)  # a film of its own that takes longer than the group's limit
    found = evaluator.run(dit, {}, 1)
    return {name: value for name, value in found.items() if name != "eval_seconds"}, is_sharded(dit)


def two_ranks(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    return numbers(folder, Mesh.launch(1, "cpu"), True)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(two_ranks, 2, folder, folder), folder


def test_ranks_share_the_work_and_agree(found, tmp_path, monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.MODELS["tiny"])
    for part, name in ((evaluate, "FILMS"), (validation, "CLIPS"), (evaluate.Judge, "read"), (evaluate, "score_film")):
        monkeypatch.setattr(part, name, getattr(part, name))  # `numbers` changes them
    (first, second), folder = found
    alone, _ = numbers(tmp_path, Mesh(), False)
    assert first == second and first[1] and set(first[0]) == set(alone)
    assert all(first[0][name] == pytest.approx(alone[name], rel=1e-5) for name in alone)
    films = [sorted(path.name for path in root.rglob("film_*")) for root in (folder, tmp_path)]
    assert films[0] == films[1] and len(films[0]) == 4
