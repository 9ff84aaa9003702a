"""The loop on a GPU: nothing in a step waits for the device, and a refused step leaves every bit as it was."""

import pytest
import torch
from torch import nn

from longlive.parallel.data_parallel import Replicas
from longlive.train.state import optimizer_tensors
from longlive.train.trainer import Loop, LoopSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SETTINGS = {
    "lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "max_grad_norm": 1.0, "accumulation": 2, "warmup_steps": 0, "schedule": "constant",
    "ema_decay": 0.9, "ema_start_step": 0, "max_steps": 9, "max_seconds": 0.0, "checkpoint_every": 0, "keep": 0, "seed": 3, "save": False,
}  # fmt: skip


class Task:
    """Two blocks and a head; the gradient of step 3 is no number."""

    name = "toy"

    def __init__(self):
        torch.manual_seed(0)
        self.device, self.module = torch.device("cuda"), nn.Module()
        self.module.blocks, self.module.head = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)]), nn.Linear(64, 8)
        self.module.to(self.device)

    def warm_up(self):
        return iter(())

    def batch(self, draw):
        return draw.step, torch.randn(16, 64, generator=draw.generator, device=self.device)

    def loss(self, batch):
        step, x = batch
        for block in self.module.blocks:
            x = block(x).tanh()
        return self.module.head(x).square().mean() * (float("nan") if step == 3 else 1.0), {}

    def export(self, folder, step, ema):
        pass

    def finish(self, folder):
        return {}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_waits_and_a_refused_one_changes_nothing(tmp_path, optimizer):
    task = Task()
    loop = Loop(task, LoopSettings(optimizer=optimizer, **SETTINGS), tmp_path, config={}, replicas=Replicas(), stream=0)
    player = loop.players[0]

    def everything():
        loop._settle()
        tensors = dict(task.module.named_parameters()) | optimizer_tensors(player.optimizer, task.module)
        tensors |= {f"ema.{name}": tensor for name, tensor in player.ema.tensors().items()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    loop._step(), loop._step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = everything()
    loop._step()
    after = everything()
    assert loop.skipped.row == 1 and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    loop._step()
    assert loop.skipped.row == 1  # not yet read
    moved = everything()
    assert loop.skipped.row == 0 and all(tensor.isfinite().all() for tensor in moved.values())
    assert any(not torch.equal(moved[name], tensor) for name, tensor in before.items() if name.startswith("ema."))
