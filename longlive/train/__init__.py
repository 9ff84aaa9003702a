"""Training: `run(config, logdir)` picks the trainer that `algorithm.trainer` names and runs its loop.

`trainer.py` is the loop, `objective.py` and `teacher_forcing.py` what a step computes, `diffusion.py` and `vae.py` the tasks.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config, availability
from ..config.show import config_table, config_yaml
from ..core.errors import InputError, NotAvailable
from ..core.log import launch_rank, logger, warn_once
from ..parallel.data_parallel import Replicas
from ..parallel.mesh import Mesh
from .trainer import Loop, LoopSettings


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line decides about a run, apart from its configuration."""

    auto_resume: bool = True
    save: bool = True
    wandb: bool = False
    wandb_dir: Path | None = None


def loop_settings(config: Config, seed: int, save: bool) -> LoopSettings:
    t = config.training
    return LoopSettings(
        optimizer=t.optimizer,
        lr=t.lr,
        betas=(t.beta1, t.beta2),
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        accumulation=t.gradient_accumulation_steps,
        warmup_steps=t.warmup_steps,
        schedule=t.lr_schedule,
        ema_decay=t.ema_weight,
        ema_start_step=t.ema_start_step,
        max_steps=t.max_iters,
        max_seconds=t.max_seconds,
        checkpoint_every=t.log_iters,
        keep=t.max_checkpoints,
        seed=seed,
        save=save,
    )


def training_device(name: str, local_rank: int) -> torch.device:
    """`auto`: this process's GPU, else the CPU. Sets the process-wide switches that training speed depends on."""
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    return device


def _run_task(task_class: Callable) -> Callable[[Config, Path, RunOptions], dict[str, float]]:
    def run_task(config: Config, logdir: Path, options: RunOptions) -> dict[str, float]:
        device_type = "cuda" if torch.cuda.is_available() and config.inference.device != "cpu" else "cpu"
        replicas = Replicas.launch(device_type)
        if replicas.rank:
            logger.setLevel(logging.WARNING)
        device = training_device(config.inference.device, replicas.local_rank)
        mesh = Mesh.launch(config.infra.sequence_parallel_size, device_type)
        seed = config.logging.seed or int(replicas.maximum(secrets.randbelow(2**31) + 1)[0])
        config = config.with_overrides([f"logging.seed={seed}"])
        task = task_class()(config, device, mesh)
        count = sum(p.numel() for p in task.module.parameters())
        logger.info("trainer %s: %.2f M parameters on %s, %d process(es), seed %d", task.name, count / 1e6, device, replicas.size, seed)
        loop = Loop(
            task,
            loop_settings(config, seed, options.save),
            logdir,
            config=config_table(config),
            replicas=replicas,
            stream=mesh.dp_rank,
            auto_resume=options.auto_resume,
            tracker=_tracker(config, logdir, options, replicas),
        )
        try:
            return loop.fit()
        finally:
            replicas.leave()

    return run_task


def _tracker(config: Config, logdir: Path, options: RunOptions, replicas: Replicas) -> Callable[[dict], None] | None:
    if not options.wandb or replicas.rank:
        return None
    from .tracking import wandb_tracker

    return wandb_tracker(config, logdir, options.wandb_dir)


def _vae() -> type:
    from .vae import VAETask

    return VAETask


def _diffusion() -> type:
    from .diffusion import DiffusionTask

    return DiffusionTask


def _judge(config: Config, logdir: Path, options: RunOptions) -> dict[str, float]:
    from ..world.judge_training import train_judge

    return train_judge(config, logdir) or {}


def _later(config: Config, logdir: Path, options: RunOptions) -> dict[str, float]:
    raise NotAvailable("distillation (algorithm.trainer: score_distillation)", "train with trainer: diffusion")


TRAINERS: dict[str, Callable[[Config, Path, RunOptions], dict[str, float]]] = {
    "diffusion": _run_task(_diffusion),
    "vae": _run_task(_vae),
    "judge": _judge,
    "score_distillation": _later,
}


def run(config: Config, logdir: Path, options: RunOptions = RunOptions()) -> dict[str, float]:
    """Trains as `config` says, in `logdir`: metrics.jsonl, config.yaml, weights, and checkpoints to resume from.

    Returns the last measurements. Raises Interrupted (exit code 130) when asked to stop, after saving.
    """
    availability(config, "train")
    if config.evaluation.interval > 0:
        warn_once("films during training (evaluation.interval) are not made yet; generate them from the weights in --logdir")
    logdir = Path(logdir)
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        if launch_rank()[0] == 0:
            (logdir / "config.yaml").write_text(config_yaml(config, changed=True), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--logdir {logdir} cannot be written ({error.strerror}); give another folder") from error
    return TRAINERS[config.algorithm.trainer](config, logdir, options)
