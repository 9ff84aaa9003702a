"""Learning rate, EMA, parameter groups, metrics, shards."""

import json

import pytest
import torch
from torch import nn

from longlive.core.errors import LongLiveError
from longlive.train.export import SHARD_BYTES, shards
from longlive.train.metrics import Metrics
from longlive.train.muon import Muon
from longlive.train.optim import EMA, adamw, guarded_step, learning_rate
from longlive.train.trainer import seed_of


def test_rate_warms_up_and_falls_to_nothing():
    rates = [learning_rate(s, s / 100, lr=1.0, warmup_steps=10, schedule="cosine") for s in range(100)]
    assert rates[0] < 0.11 and max(rates) > 0.97 and rates[-1] < 0.001
    assert learning_rate(500, 5.0, lr=2.0, warmup_steps=0, schedule="constant") == 2.0


def test_ema_equals_the_weights_until_its_start_and_follows_after():
    module = nn.Linear(2, 2)
    ema = EMA(module, 0.9, start_step=1)
    with torch.no_grad():
        module.weight.fill_(1.0)
        ema.update(module, 1)
        module.weight.fill_(2.0)
        ema.update(module, 2)
    torch.testing.assert_close(ema.tensors()["weight"], torch.full((2, 2), 1.1))
    assert EMA(module, 0.0).tensors() == {}


def test_only_matrices_decay():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    groups = adamw(module.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.1).param_groups
    assert [len(g["params"]) for g in groups] == [1, 3] and [g["weight_decay"] for g in groups] == [0.1, 0.0]


@pytest.mark.parametrize("optimizer", [adamw, lambda p, **how: Muon(p, lr=how["lr"], weight_decay=0.0)], ids=["adamw", "muon"])
def test_a_step_shows_in_the_version_of_weights(optimizer):
    """What is made of weights and kept (texts, doubled kernels, a merged copy) is made again: torch's fused AdamW alone would leave no sign."""
    weight = nn.Parameter(torch.randn(16, 16))
    part, before = optimizer([weight], lr=0.1, betas=(0.0, 0.9), weight_decay=0.0), weight._version
    weight.grad = torch.ones_like(weight)
    guarded_step([part], torch.zeros(()))
    assert weight._version > before


def test_metrics_write_rows_and_drop_those_that_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in (1, 2, 3):
        metrics.add(step, {"loss": torch.tensor(float(step)), "loss_0": torch.tensor(float("nan"))}, {"lr": 0.1})
    assert metrics.flush()["loss"] == 2.0
    again = Metrics(path, resume_step=2)
    again.add(3, {"loss": torch.tensor(9.0), "loss_0": torch.tensor(1.0)}, {"lr": 0.1})
    again.flush()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1.0), (2, 2.0), (3, 9.0)] and rows[0]["loss_0"] is None


def test_a_loss_that_is_no_number_stops_the_run_with_its_step(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.add(7, {"loss": torch.tensor(float("inf"))}, {})
    with pytest.raises(LongLiveError, match="step 7"):
        metrics.flush()


def test_seeds_depend_on_every_part_and_on_their_order():
    seeds = {seed_of(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seeds) == 512 and max(seeds) < 2**63


def test_shards_keep_every_tensor_and_stay_small():
    tensors = {str(i): torch.zeros(2**20) for i in range(9)}
    groups = shards(tensors)
    assert [name for g in groups for name in g] == list(tensors)
    assert all(sum(t.nbytes for t in g.values()) <= SHARD_BYTES for g in groups) and len(groups) == 3
