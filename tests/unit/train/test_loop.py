"""The loop around a step: a refused step leaves everything as it was and is noticed a step later; garbage is collected at chosen steps."""

import copy
import gc
import json
import random
from contextlib import suppress

import pytest
import torch
from torch import nn
from train_toys import shrink_tiny, training, write_vae

from longlive.config import load_config
from longlive.core.errors import LongLiveError
from longlive.models import spec
from longlive.parallel.data_parallel import Replicas
from longlive.parallel.mesh import Mesh
from longlive.train import guards, trainer
from longlive.train.diffusion import DiffusionTask
from longlive.train.garbage import Garbage
from longlive.train.muon import muon
from longlive.train.players import Role
from longlive.train.optim import adamw, guarded_step
from longlive.train.state import optimizer_tensors, parts, untouched
from longlive.train.trainer import Loop, LoopSettings

RATES = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
SETTINGS = {
    "optimizer": "muon", **RATES, "max_grad_norm": 1.0, "accumulation": 1, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0.9, "ema_start_step": 1,
    "max_steps": 6, "max_seconds": 0.0, "checkpoint_every": 0, "keep": 0, "seed": 3, "save": False,
}  # fmt: skip


def network():
    torch.manual_seed(0)
    module = nn.Module()
    module.blocks, module.head = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)]), nn.Linear(16, 4)
    return module


class Task:
    """Steps `bad` have a gradient that is no number. `seen` is the order of what happens."""

    name, device = "toy", torch.device("cpu")

    def __init__(self, bad=()):
        self.module, self.bad, self.seen = network(), bad, []

    def warm_up(self):
        return iter(())

    def batch(self, draw):
        self.seen.append(("batch", draw.step))
        return draw.step, torch.randn(3, 16, generator=draw.generator)

    def loss(self, batch):
        step, x = batch
        for block in self.module.blocks:
            x = block(x).tanh()
        return self.module.head(x).square().mean() * (float("nan") if step in self.bad else 1.0), {}

    def export(self, folder, step, ema):
        self.exported = {name: tensor.clone() for name, tensor in ema.items()}

    def finish(self, folder):
        return {}


def loop(folder, task, **settings):
    return Loop(task, LoopSettings(**(SETTINGS | settings)), folder, config={}, replicas=Replicas(), stream=0)


def everything(module, optimizer):
    tensors = dict(module.named_parameters()) | optimizer_tensors(optimizer, module)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_refused_step_changes_no_bit(kind, bad):
    module = network()
    optimizer = muon(module, **RATES) if kind == "muon" else adamw(module.parameters(), **RATES)

    def step(refused):
        generator = torch.Generator().manual_seed(1)
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * (bad if refused else 1.0)
        guarded_step(parts(optimizer), torch.tensor(float(refused)))

    step(False)
    before = everything(module, optimizer)
    step(True)
    after = everything(module, optimizer)
    assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    twin = copy.deepcopy(module), copy.deepcopy(optimizer.state_dict())
    step(False)
    taken = everything(module, optimizer)
    assert any(not torch.equal(taken[name], tensor) for name, tensor in before.items())
    other = muon(twin[0], **RATES) if kind == "muon" else adamw(twin[0].parameters(), **RATES)
    other.load_state_dict(twin[1])
    for p, q in zip(twin[0].parameters(), module.parameters()):
        p.grad = q.grad
    other.step()  # as it is, without any flag
    assert all(torch.equal(tensor, taken[name]) for name, tensor in everything(twin[0], other).items())


def test_a_run_with_refused_steps_is_the_run_without_them(tmp_path):
    """Weights, optimizer state and average; steps draw by their number, so the others are the same."""
    bad = Task({1, 2, 5})
    first = loop(tmp_path / "bad", bad)
    first.fit()
    honest = loop(tmp_path / "honest", Task())
    for step in (0, 3, 4):
        honest.state = trainer.RunState(step)
        honest._step()
        honest._settle()
    honest._export()
    ours, theirs = everything(bad.module, first.players[0].optimizer), everything(honest.task.module, honest.players[0].optimizer)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert all(torch.equal(bad.exported[name], tensor) for name, tensor in honest.task.exported.items())
    rows = [json.loads(line) for line in (tmp_path / "bad" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped", 0) for row in rows] == [0, 1, 1, 0, 0, 1] and rows[1]["grad_norm"] is None


class Pair(Task):
    """Two players; steps `bad` are refused to the second only."""

    def __init__(self, bad=()):
        super().__init__(bad)
        self.other = network()
        rates = {"lr": 1e-2, "betas": (0.9, 0.99), "max_grad_norm": 1.0, "ema_decay": 0.9}
        pairs = (("one", self.module), ("two", self.other))
        self.roles = tuple(Role(name=name, network=module, trained=module, prefix=name, **rates) for name, module in pairs)

    def batch(self, draw):
        return draw.player, *super().batch(draw)

    def loss(self, batch):
        player, step, x = batch
        module = self.module if player == "one" else self.other
        for block in module.blocks:
            x = block(x).tanh()
        return module.head(x).square().mean() * (float("nan") if player == "two" and step in self.bad else 1.0), {}


def test_a_refused_player_does_not_cost_the_other_its_average(tmp_path):
    tasks = {bad: Pair(bad) for bad in ((), (1, 2))}
    for number, task in enumerate(tasks.values()):
        loop(tmp_path / str(number), task, optimizer="adamw").fit()
    sound, refused = tasks.values()
    assert all(torch.equal(tensor, refused.exported[name]) for name, tensor in sound.exported.items())
    assert not all(torch.equal(a, b) for a, b in zip(sound.other.parameters(), refused.other.parameters()))


def test_a_report_leaves_out_what_was_not_measured_and_never_a_loss(tmp_path, caplog):
    task = Task({0})
    loss = task.loss
    task.loss = lambda batch: (loss(batch)[0], {"loss_0": torch.tensor(float("nan")), "loss_1": torch.tensor(0.5)})
    with caplog.at_level("INFO"):
        loop(tmp_path, task, max_steps=1).fit()
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("step 1  ")]
    assert "loss_0" not in line and "loss_1 0.5" in line and "loss nan" in line and "grad_norm nan" in line


def test_the_host_reads_a_steps_flag_when_the_next_one_is_on_its_way(tmp_path, monkeypatch):
    task = Task()

    class Watched(guards.Late):
        def read(self):
            task.seen.append(("read", run.state.step - 1))
            return super().read()

    monkeypatch.setattr(trainer, "Late", Watched)
    run = loop(tmp_path, task, max_steps=3)
    run.fit()
    assert task.seen == [("batch", 0), ("batch", 1), ("read", 0), ("batch", 2), ("read", 1), ("read", 2)]


def test_too_many_in_a_row_end_the_run_before_the_next_step_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SKIPS_IN_A_ROW", 2)
    task = Task({2, 3})
    with pytest.raises(LongLiveError, match="gradients of steps 3 to 4 are not finite.*weights are those of step 2"):
        loop(tmp_path, task).fit()
    honest = Task()
    loop(tmp_path / "two", honest, max_steps=2).fit()
    assert all(torch.equal(p, q) for p, q in zip(task.module.parameters(), honest.module.parameters()))


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_what_runs_untouched_changes_neither_random_numbers_nor_modes(ends):
    module, benchmark = network(), torch.backends.cudnn.benchmark
    module.blocks[1].eval()

    def drawn():
        return torch.rand(3).tolist(), random.random()

    def modes():
        return [part.training for part in module.modules()]

    state, before = (torch.get_rng_state(), random.getstate()), modes()
    expected = drawn()
    torch.set_rng_state(state[0]), random.setstate(state[1])
    with suppress(ZeroDivisionError), untouched(module, torch.device("cpu")):
        assert drawn() == expected and not torch.is_grad_enabled()
        module.eval()
        torch.backends.cudnn.benchmark = not benchmark
        assert ends == "well" or 1 / 0
    assert drawn() == expected and modes() == before and len(set(before)) == 2
    assert torch.is_grad_enabled() and torch.backends.cudnn.benchmark == benchmark


def test_garbage_is_collected_every_so_many_steps_and_as_usual_afterwards(tmp_path, monkeypatch):
    task, real = Task(), gc.collect
    monkeypatch.setattr(gc, "collect", lambda *generation: task.seen.append(("collect", gc.isenabled())) or real(*generation))
    run = loop(tmp_path, task, max_steps=5, gc_interval=2, evaluate_every=3)
    task.evaluate = lambda step, ema: task.seen.append(("evaluate", gc.isenabled())) or {}
    run.fit()
    collect, evaluate = ("collect", False), ("evaluate", True)
    assert task.seen == [
        ("collect", True), ("batch", 0), ("batch", 1), collect, ("batch", 2), evaluate, ("batch", 3), collect, ("batch", 4),
    ]  # fmt: skip
    assert gc.isenabled() and not gc.get_freeze_count()


def test_steps_leave_no_cycle_that_holds_a_tensor(tmp_path, monkeypatch):
    """Recomputation, the model's own errors, image to video: whatever a step has made is gone without a collection."""
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()
    changes = ["data.data_path=null", "world.clips=2", "world.chunks=3", "algorithm.i2v=true", "training.error_recycling.enabled=true"]
    config = load_config(training("", write_vae(tmp_path)), [*changes, "infra.gradient_checkpointing=true", "training.ema_weight=0.9"])
    run = loop(tmp_path, DiffusionTask(config, torch.device("cpu"), Mesh()), optimizer="adamw")
    run._warm_up()
    run._step()
    with Garbage(100):
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            run._step()
            gc.collect()
            held = [found for found in gc.garbage if isinstance(found, torch.Tensor)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
    assert not held
