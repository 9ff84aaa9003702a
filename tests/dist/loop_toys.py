"""A toy task for the training loop: the toy film batches of `sp_toys`, whatever the number of ranks, with a place in the data and something of its own."""

import torch
from sp_toys import BATCH, CASES, FRAMES, batch_of, toy_dit
from torch import nn

from longlive.parallel.apply import Plan, apply
from longlive.parallel.data_parallel import Replicas
from longlive.parallel.mesh import Mesh
from longlive.train.compiled import checkpoint_blocks
from longlive.train.sharded import film_layout, sharded_loss, sharded_velocity
from longlive.train.trainer import Loop, LoopSettings

CASE = CASES["masked"]
PLAN = {"blocks": ("blocks.*",), "entries": ("text_embedding",), "recompute": checkpoint_blocks}
SETTINGS = {
    "optimizer": "adamw", "lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "max_grad_norm": 0.5, "accumulation": 1, "warmup_steps": 0,
    "schedule": "cosine", "ema_decay": 0.9, "ema_start_step": 1, "max_steps": 4, "max_seconds": 0.0, "checkpoint_every": 2, "keep": 0, "seed": 3,
}  # fmt: skip


class ToyTask:
    """Samples in an order that follows from one number; `noise` is drawn from the process-wide generator, as nothing in a real task is."""

    name = "toy"

    def __init__(self, mesh, strategy):
        self.mesh, self.device, self.position = mesh, torch.device("cpu"), 0
        dit = toy_dit()
        dit.blocks = nn.ModuleList(dit.blocks[:1])
        self.module = apply(dit, self.device, Plan(strategy=strategy, **PLAN))
        self.errors = torch.zeros(2, dtype=torch.float64)
        self.evaluated = []

    def warm_up(self):
        return iter(())

    def batch(self, draw):
        share, first = BATCH // self.mesh.dp_size, self.position
        self.position += BATCH
        own = range(first + self.mesh.dp_rank * share, first + (self.mesh.dp_rank + 1) * share)
        self.errors += self.mesh.sp_rank + 1
        return batch_of(CASE, [(3 * number + number // BATCH) % BATCH for number in own])

    def loss(self, batch):
        layout = film_layout(FRAMES, CASE.copies, self.mesh, CASE.kind)
        velocity = sharded_velocity(self.module, self.module.text(batch.embeds), batch.film, batch.context, batch.copies, self.mesh, layout)
        loss, _ = sharded_loss(velocity, batch.flows, self.mesh, layout)
        return loss, {"luck": torch.rand(())}

    def state(self):
        return {"position": self.position, "errors": {"entries": self.errors.clone(), "share": [self.mesh.sp_rank, self.mesh.sp_size]}}

    def restore(self, state):
        self.position, self.errors = state["position"], state["errors"]["entries"].clone()

    def merged(self, states):
        group = [states[rank]["errors"]["entries"] for rank in range(states[0]["errors"]["share"][1])]
        return {"position": states[0]["position"], "errors": {"entries": torch.stack(group).mean(0)}}

    def evaluate(self, step, ema):
        """Does what an evaluation must not let out."""
        torch.rand(7)
        self.module.eval()
        self.evaluated.append((step, torch.is_grad_enabled(), len(ema)))
        self.module.text(batch_of(CASE, [0]).embeds)
        return {"score": float(step)}

    def export(self, folder, step, ema):
        pass

    def finish(self, folder):
        return {}


def toy_loop(folder, strategy="full", sp_size=1, **settings):
    mesh = Mesh.launch(sp_size, "cpu")
    replicas = Replicas.launch("cpu")
    config = {"infra": {"sequence_parallel_size": sp_size}, "training": {"max_iters": settings.get("max_steps", 4)}}
    task = ToyTask(mesh, strategy)
    return Loop(task, LoopSettings(**(SETTINGS | settings)), folder, config=config, replicas=replicas, stream=mesh.dp_rank)
