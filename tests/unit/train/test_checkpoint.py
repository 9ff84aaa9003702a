"""Checkpoints of one process: written beside training, whole or not there; damage is named; older files still resume; weights for use come out."""

import json
import shutil
import threading
import time

import pytest
import torch
from torch import nn

from longlive.core.errors import CheckpointError, InputError
from longlive.models.weights import read_state
from longlive.parallel.data_parallel import Replicas
from longlive.train import checkpoint
from longlive.train.checkpoint import RunState, Writer, changed_keys, folders, join, split
from longlive.train.players import Player, Role
from longlive.train.run_files import RunFiles
from longlive.train.state import optimizer_tensors

CONFIG = {"training": {"lr": 0.1, "betas": [0.9]}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])
        self.head = nn.Linear(16, 4)
        self.register_buffer("seen", torch.zeros(()))


class Task:
    name, device = "toy", torch.device("cpu")

    def __init__(self):
        torch.manual_seed(0)
        self.module = Net()
        self.kept = {"at": 0}

    def state(self):
        return self.kept

    def restore(self, state):
        self.kept = state


class Run:
    """A task with everything that a loop has of it."""

    def __init__(self, folder, optimizer="adamw", decay=0.9, keep=0):
        self.task = Task()
        module = self.task.module
        role = Role(name="generator", network=module, trained=module, lr=1e-2, betas=(0.9, 0.99), max_grad_norm=1.0, ema_decay=decay)
        self.player = Player(role, optimizer=optimizer, weight_decay=0.1)
        self.optimizer, self.ema = self.player.optimizer, self.player.ema
        self.files = RunFiles(self.task, [self.player], folder, config=CONFIG, replicas=Replicas(), keep=keep)

    def step(self, number):
        generator = torch.Generator().manual_seed(number)
        for p in self.task.module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        self.optimizer.step()
        self.ema.update(self.task.module, number)
        self.task.module.seen += 1
        self.task.kept = {"at": number, "buffers": {"counts": torch.tensor([number]), "sizes": [1, 2]}}

    def weights(self):
        return [*self.task.module.state_dict().values(), *self.ema.shadow]

    def save(self, step):
        self.files.save(RunState(step, 0.5))


def saved(folder, steps=(1, 2), **how):
    run = Run(folder, **how)
    for step in steps:
        run.step(step)
        run.save(step)
    run.files.wait()
    return run


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_everything_comes_back(tmp_path, optimizer):
    run, other = saved(tmp_path, optimizer=optimizer), Run(tmp_path, optimizer)
    luck = torch.rand(3, generator=torch.Generator().set_state(torch.get_rng_state()))
    torch.manual_seed(77)
    assert other.files.resume() == RunState(2, 0.5)
    assert torch.equal(torch.rand(3), luck)
    assert other.task.kept["at"] == 2 and other.task.kept["buffers"]["sizes"] == [1, 2] and other.task.kept["buffers"]["counts"].tolist() == [2]
    for each in (run, other):
        each.step(3)
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), other.weights()))


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, monkeypatch):
    gate, publish = threading.Event(), Writer._publish
    monkeypatch.setattr(Writer, "_publish", lambda self, *job: gate.wait(20) and publish(self, *job))
    run = Run(tmp_path)
    run.step(1)
    before = [t.clone() for t in run.weights()]
    run.save(1)
    run.step(2)
    assert not folders(tmp_path)
    second = threading.Thread(target=run.save, args=(2,))
    second.start()
    time.sleep(0.2)
    assert second.is_alive()  # one at a time: it waits for the first
    gate.set()
    second.join()
    run.files.wait()
    assert [f.name for f in folders(tmp_path)] == ["checkpoint_model_000001", "checkpoint_model_000002"]
    shutil.rmtree(folders(tmp_path)[-1])
    other = Run(tmp_path)
    other.files.resume()
    assert all(torch.equal(a, b) for a, b in zip(before, other.weights()))


def test_the_newest_are_kept_and_unfinished_ones_removed(tmp_path):
    (tmp_path / "checkpoint_model_000009.tmp").mkdir(parents=True)
    saved(tmp_path, steps=(1, 2, 3), keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["checkpoint_model_000002", "checkpoint_model_000003"]


def test_checkpoints_of_another_run_are_neither_counted_nor_passed_over_in_silence(tmp_path, caplog):
    saved(tmp_path, steps=(6, 7))
    run = saved(tmp_path, steps=(1, 2, 3), keep=1)
    assert [checkpoint.step_of(f) for f in folders(tmp_path)] == [3, 6, 7]
    run.files.note_others()
    assert "goes on from the highest step (now checkpoint_model_000007)" in caplog.text


def truncate(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


def flip_index(folder):
    (folder / ".metadata").write_bytes(b"x" * (folder / ".metadata").stat().st_size)


def lose(folder, entry):
    run = json.loads((folder / "run.json").read_text())
    del run[entry]
    (folder / "run.json").write_text(json.dumps(run))


DAMAGE = {
    "truncated": truncate,
    "index": flip_index,
    "no run file": lambda folder: (folder / "run.json").unlink(),
    "half a run file": lambda folder: (folder / "run.json").write_text('{"step": 2'),
    "no entries": lambda folder: (folder / "run.json").write_text("[]"),
    "no topology": lambda folder: lose(folder, "topology"),
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_no_older_one_is_taken(tmp_path, how):
    saved(tmp_path)
    DAMAGE[how](tmp_path / "checkpoint_model_000002")
    with pytest.raises(CheckpointError, match="checkpoint_model_000002 is damaged .*remove it to go on from checkpoint_model_000001, or use --no-auto-resume"):
        Run(tmp_path).files.resume()
    shutil.rmtree(tmp_path / "checkpoint_model_000002")
    assert Run(tmp_path).files.resume().step == 1


def test_another_trainer_and_another_model_are_refused(tmp_path):
    saved(tmp_path)
    other = Run(tmp_path)
    other.task.name = "else"
    with pytest.raises(CheckpointError, match="written by trainer 'toy', not 'else'"):
        other.files.resume()
    bigger = Run(tmp_path)
    bigger.task.module.head = nn.Linear(16, 5)
    with pytest.raises(CheckpointError, match=r"generator.head.weight is \[4, 16\] there and \[5, 16\] here"):
        bigger.files.resume()


def test_a_run_without_an_average_may_get_one_and_the_other_way_round(tmp_path):
    saved(tmp_path / "a", decay=0.0)
    run = Run(tmp_path / "a")
    run.files.resume()
    assert all(torch.equal(a, b) for a, b in zip(run.ema.shadow, run.task.module.parameters()))
    saved(tmp_path / "b")
    assert Run(tmp_path / "b", decay=0.0).files.resume().step == 2


def test_what_cannot_be_written_is_said(tmp_path):
    run = Run(tmp_path)
    run.step(1)
    run.save(1)
    run.files.wait()
    (tmp_path / "checkpoint_model_000002.tmp").write_text("in the way")
    run.step(2)
    with pytest.raises((InputError, OSError)):
        run.save(2)
        run.files.wait()
    assert [f.name for f in folders(tmp_path)] == ["checkpoint_model_000001"]


def test_a_change_of_the_configuration_is_said(tmp_path, caplog):
    saved(tmp_path)
    run = Run(tmp_path)
    run.files.config = {"training": {"lr": 0.2, "betas": (0.9,)}}
    run.files.resume()
    assert "has changed since the checkpoint: training.lr" in caplog.text
    assert list(changed_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}, "d": 3})) == ["a.c", "d"]


@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
@pytest.mark.parametrize("before, now", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_starts_anew_and_says_so(tmp_path, caplog, before, now, single):
    """For the matrices of blocks; AdamW's state of the rest stays. Numbers in a single file are those of another layout: there for all."""
    run = Run(tmp_path, before) if single else saved(tmp_path, optimizer=before)
    if single:
        run.step(1)
        (tmp_path / "checkpoint_model_000001").mkdir()
        content = {"generator": run.task.module.state_dict(), "generator_optimizer": run.optimizer.state_dict(), "step": 1}
        torch.save(content, tmp_path / "checkpoint_model_000001" / "model.pt")
    other = Run(tmp_path, now)
    other.files.resume()
    said = [record.getMessage() for record in caplog.records if "another training.optimizer" in record.getMessage()]
    which = "the optimizer starts anew for all parameters" if single else "starts anew for 2 parameters: blocks.0.weight, blocks.1.weight"
    assert len(said) == 1 and said[0].endswith(which)
    loaded, kept = (optimizer_tensors(r.optimizer, r.task.module) for r in (other, run))
    assert loaded.keys() == (set() if single else {name for name in kept if "blocks" not in name or name.endswith("bias")})
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.items())
    other.step(3)
    fresh = saved(tmp_path / "new", (1,), optimizer=now)
    assert optimizer_tensors(other.optimizer, other.task.module).keys() == optimizer_tensors(fresh.optimizer, fresh.task.module).keys()


def test_trees_of_tensors_and_values_come_apart_and_together():
    tree = {"a": torch.arange(3), "b": {"c": [1, "x"], "d": {}, "tensor": torch.ones(())}}
    plain, tensors = split(tree, "task")
    back = join(json.loads(json.dumps(plain)), tensors)
    assert set(tensors) == {"task.a", "task.b.tensor"} and back["b"]["c"] == [1, "x"] and back["b"]["d"] == {} and torch.equal(back["a"], tree["a"])


@pytest.mark.parametrize("optimizer, layout", [("adamw", "ours"), ("muon", "ours"), ("adamw", "published")])
def test_the_documented_single_file_resumes(tmp_path, optimizer, layout):
    """`ours`: with clock, random state and trainer; `published`: `model.` before the names, optimizer state by name, none of these."""
    run = Run(tmp_path, optimizer)
    run.step(1)
    names = [name for name, _ in run.task.module.named_parameters()]
    content = {"generator": run.task.module.state_dict(), "generator_ema": run.ema.tensors(), "generator_optimizer": run.optimizer.state_dict(), "step": 1}
    if layout == "ours":
        content |= {"elapsed": 2.5, "random": torch.get_rng_state(), "trainer": "toy", "config": {}}
    else:
        content["generator"] = {f"model.{name}": tensor for name, tensor in content["generator"].items()}
        by_name = {f"model.{n}": run.optimizer.state[p] for n, p in run.task.module.named_parameters()}
        assert len(by_name) == len(names)
        content["generator_optimizer"] = {"state": by_name, "param_groups": []}
    folder = tmp_path / "checkpoint_model_000001"
    folder.mkdir()
    torch.save(content, folder / "model.pt")
    other = Run(tmp_path, optimizer)
    assert other.files.resume() == RunState(1, 2.5 if layout == "ours" else 0.0)
    for each in (run, other):
        each.step(2)
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), other.weights()))
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="checkpoint_model_000001 is damaged"):
        Run(tmp_path, optimizer).files.resume()


def test_a_checkpoint_is_read_as_weights(tmp_path):
    run = saved(tmp_path)
    folder = folders(tmp_path)[-1]
    for use_ema, want in ((False, run.task.module.state_dict()), (True, run.ema.tensors())):
        state = read_state(folder, use_ema=use_ema)
        assert state.metadata == {"trainer": "toy", "step": 2} and state.tensors.keys() == want.keys()
        assert all(torch.equal(state.tensors[name], want[name]) for name in want)
    with pytest.raises(CheckpointError, match="damaged"):
        truncate(folder)
        read_state(folder)
    with pytest.raises(CheckpointError, match="is damaged .run.json has no step"):
        (folder / "run.json").write_text("[]")
        read_state(folder)


def test_run_states_are_json_for_other_tools(tmp_path):
    saved(tmp_path)
    run = json.loads((folders(tmp_path)[-1] / "run.json").read_text())
    assert run["config_hash"] == checkpoint.config_hash(CONFIG) and run["config"] == CONFIG and run["topology"] == {"world": 1, "sp": 1}
