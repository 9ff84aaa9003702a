"""A LoRA by teacher forcing: the diffusion trainer on a frozen generator, with the `adapter` section."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..config.root import Config
from ..models.spec import ModelSpec
from ..models.wan_dit import WanDiT
from ..parallel.mesh import Mesh
from .cast import STUDENT, AdapterView, Merged, attach, origin
from .diffusion import DiffusionTask
from .lora_export import save_adapters
from .memory import TrainingMemory, sharing_ranks
from .players import Role


def diffusion_task(config: Config, device: torch.device, mesh: Mesh, logdir: Path | None = None) -> DiffusionTask:
    """The task of trainer diffusion: a LoRA with the `adapter` section, else all weights."""
    return (DiffusionTask if config.adapter is None else LoraDiffusionTask)(config, device, mesh, logdir)


class LoraDiffusionTask(DiffusionTask):
    """What differs from training all weights: which parameters learn, what an evaluation sees, what is written."""

    def _adapt(self, module: WanDiT, spec: ModelSpec) -> None:
        origin(self.config, spec)  # refuses a generator with a LoRA merged into it
        module.requires_grad_(False)
        attach(module, spec, self.config, STUDENT)
        t, view = self.settings, AdapterView(module, STUDENT)
        rates = {"lr": t.lr, "betas": (t.beta1, t.beta2), "max_grad_norm": t.max_grad_norm, "ema_decay": t.ema_weight}
        self.roles = (Role(name=f"{STUDENT}_lora", network=module, trained=view, **rates),)

    def _memory(self, module: WanDiT) -> TrainingMemory:
        learns, still = (sum(p.numel() for p in module.parameters() if p.requires_grad == wanted) for wanted in (True, False))
        share, whole = sharing_ranks(self.config.infra.sharding_strategy, self.mesh.size), super()._memory(module)
        return replace(whole, states=whole.states * learns / (learns + still), frozen=whole.frozen + 4 * still / share)

    def evaluate(self, step: int, ema: dict[str, torch.Tensor]) -> dict[str, float]:
        raw = Merged(self.module, STUDENT, self.roles[0].trained.state_dict())
        return self.evaluator.run(self.module, Merged(self.module, STUDENT, ema) if ema else {}, step, raw=raw)

    def export(self, folder: Path, step: int, ema: dict[str, torch.Tensor]) -> None:
        """LOGDIR/lora.pt and LOGDIR/lora/."""
        metadata = {"trainer": self.name, "step": str(step), "seed": str(self.config.logging.seed)}
        save_adapters(folder, {STUDENT: self.module}, ema, metadata)
