"""A dry run: everything that a training does before and in its first step, with what it would take, and nothing written."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config
from ..config.show import config_table
from ..core.geometry import Geometry, pixel_frames
from ..core.log import logger
from .guards import check_room, room_for
from .launch import Launched, launch, loop_settings
from .memory import GIB, TrainingMemory
from .trainer import Loop


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run found. `row`: the measurements of the step; `used_bytes`: the most memory that this process had."""

    about: tuple[tuple[str, str], ...]
    memory: TrainingMemory
    row: dict[str, float]
    used_bytes: int

    def lines(self) -> list[str]:
        """The report."""
        head = [f"{name:12s}{value}" for name, value in self.about]
        losses = ", ".join(f"{name} {value:.4f}" for name, value in self.row.items() if name in ("loss", "grad_norm"))
        measured = f"{losses}; {self.row['ms'] / 1000:.2f} s; {self.used_bytes / GIB:.2f} GiB used at most"
        estimate = [f"  {line}" for line in self.memory.lines()]
        return [*head, "memory of each process, estimated (docs/training.md says how):", *estimate, f"one step    {measured}"]


def rehearse(config: Config, task_class: Callable) -> Rehearsal:
    """One step of `task_class`, the diffusion or distillation trainer's. Every rank of a launch must call it."""
    if config.data.data_path is None:
        config = config.with_overrides([f"world.clips={config.training.batch_size}", "world.refresh=0"])
    with launch(config, task_class, None) as ready, tempfile.TemporaryDirectory() as folder:
        settings = loop_settings(ready.config, save=False)
        loop = Loop(
            ready.task,
            settings,
            Path(folder),
            config=config_table(ready.config),
            replicas=ready.replicas,
            stream=ready.mesh.dp_rank,
            auto_resume=False,
        )
        logger.info("estimated memory of each process: %.1f GiB", ready.task.memory.peak / GIB)
        check_room(ready.task.memory.peak, room_for(ready.device), config_table(ready.config))
        row = loop.rehearse()
        return Rehearsal(_about(ready), ready.task.memory, row, _used(ready.device))


def _about(ready: Launched) -> tuple[tuple[str, str], ...]:
    config, mesh, frames = ready.config, ready.mesh, ready.task.clips.frames
    size = Geometry.of_latent(*config.data.image_or_video_shape[3:])
    per_step = config.training.batch_size * config.training.gradient_accumulation_steps * mesh.dp_size
    parameters = sum(p.numel() for p in ready.task.module.parameters())
    return (
        ("config", config.source or "no file"),
        ("data", ready.task.clips.title),
        ("sample", f"{frames} latent frames = {pixel_frames(frames)} frames of {size.height} x {size.width}, {frames // config.chunk_frames} chunks"),
        ("processes", f"{mesh.size} = dp {mesh.dp_size} x sp {mesh.sp_size} on {ready.device.type}, {config.infra.sharding_strategy}"),
        ("model", f"{config.model_kwargs.model_name}, {parameters / 1e6:.2f} M parameters"),
        ("step", f"{per_step} samples: batch {config.training.batch_size} x accumulation {config.training.gradient_accumulation_steps} x dp {mesh.dp_size}"),
    )


def _used(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
