"""The training benchmark on two ranks: every layout is measured with sharded parameters, and a case without memory does not end the others."""

import json
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from longlive.bench import train as train_bench
from longlive.bench.train import TrainSettings, bench_train
from longlive.models.spec import TINY, DiTDims

TOY = replace(TINY, dit=DiTDims(dim=16, ffn=32, layers=2, heads=2, text_dim=8, text_len=12, freq_dim=16), height=32, width=64)
SETTINGS = TrainSettings(model="tiny", frames=(8,), layers=2, fallback_layers=1, steps=1, warmup=0, keep_reads=1)


def measure(path):
    train_bench.model_spec = lambda name: TOY
    real = train_bench.TrainingStep.take

    def take(step):
        if step.settings.layout == "contiguous" and step.dims.layers == 2:
            raise torch.OutOfMemoryError(f"CUDA out of memory on rank {step.mesh.sp_rank}")
        real(step)

    train_bench.TrainingStep.take = take
    lines = []
    entries = bench_train(SETTINGS, path, lines.append)
    return entries, lines


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return run_ranks(measure, 2, folder, folder / "train.json"), folder / "train.json"


def test_every_layout_is_measured_on_the_same_work(found):
    (entries, lines), (other, silence) = found[0]
    cases = [(e["layout"], e["layers"], e["status"]) for e in entries]
    assert cases == [("none", 2, "done"), *[("contiguous", 2, "out of memory")] * 2, ("contiguous", 1, "done"), ("balanced", 2, "done")]
    none, *_, balanced = entries
    assert none["samples_per_step"] == 2 and balanced["samples_per_step"] == 1
    assert none["flops_per_step"] == 2 * balanced["flops_per_step"]
    assert balanced["utilisation"] == pytest.approx(balanced["flops_per_step"] / balanced["seconds_per_step"] / 2 / 989e12)
    assert len(balanced["peak_gib_by_rank"]) == 2
    assert lines and not silence and [e["status"] for e in other] == [e["status"] for e in entries]
    assert [e.get("seconds_per_step") for e in other] == [e.get("seconds_per_step") for e in entries]


def test_one_rank_writes_the_record(found):
    (entries, _), _ = found[0]
    assert json.loads(found[1].read_text()) == entries
