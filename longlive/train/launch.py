"""From a configuration to a task that is ready to train: processes, device, seed, data, weights, and the settings of the loop."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import Config
from ..config.show import config_table, config_yaml
from ..config.yaml_io import read_yaml
from ..core.errors import InputError
from ..core.log import environment, launch_rank, logger
from ..engine.pipeline import present
from ..parallel.data_parallel import Replicas
from ..parallel.failure import together
from ..parallel.mesh import Mesh
from .guards import memory_advice
from .trainer import LoopSettings, Task

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Launched:
    """What a trainer runs with. `config` is the given one with its seed drawn."""

    config: Config
    device: torch.device
    mesh: Mesh
    replicas: Replicas
    task: Task


def loop_settings(config: Config, save: bool) -> LoopSettings:
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
        evaluate_every=max(0, config.evaluation.interval),
        gc_interval=t.gc_interval,
        keep=t.max_checkpoints,
        seed=config.logging.seed,
        save=save,
    )


def training_device(name: str, local_rank: int) -> torch.device:
    """`auto`: this process's GPU, else the CPU; `cuda`: this process's GPU. Sets the process-wide switches that training speed depends on.

    Raises InputError for a GPU that is not there, or that several processes of this host would share.
    """
    sharing = int(environment("LOCAL_WORLD_SIZE", "1"))
    if name.startswith("cuda:") and sharing > 1:
        raise InputError(f"inference.device({name}) is one GPU for {sharing} processes of this host; set it to auto, which gives each its own")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = present(torch.device("cuda", local_rank) if name == "cuda" else torch.device(name), "inference.device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    return device


@contextmanager
def launch(config: Config, task_class: Callable[[Config, torch.device, Mesh], Task], logdir: Path | None, *, resume: bool = False) -> Iterator[Launched]:
    """Joins the other processes, draws the seed and makes the task; leaves the processes at the end. A rank that fails inside ends all.

    Raises LongLiveError, with what to lower, where memory does not suffice for anything inside.

    `logdir` gets the configuration with the seed; with `resume` a seed that an earlier run drew there is taken again. None: nothing is written.
    """
    device_type = "cuda" if torch.cuda.is_available() and config.inference.device != "cpu" else "cpu"
    replicas = Replicas.launch(device_type)
    if replicas.rank:
        logger.setLevel(logging.WARNING)
    try:
        with together(replicas), memory_advice(config_table(config)):
            device = training_device(config.inference.device, replicas.local_rank)
            mesh = Mesh.launch(config.infra.sequence_parallel_size, device_type)
            config = config.with_overrides([f"logging.seed={_seed(config, logdir if resume else None, replicas)}"])
            if logdir is not None:
                write_config(config, logdir)
            task = task_class(config, device, mesh)
            count = sum(p.numel() for p in task.module.parameters())
            ranks = f"{replicas.size} process(es) = dp {mesh.dp_size} x sp {mesh.sp_size}"
            logger.info("trainer %s: %.2f M parameters on %s, %s, seed %d", task.name, count / 1e6, device, ranks, config.logging.seed)
            yield Launched(config, device, mesh, replicas, task)
    finally:
        replicas.leave()


def public(config: Config) -> Config:
    """The configuration as files may hold it: without the key of Weights & Biases."""
    return config.with_overrides(["logging.wandb_key=null"]) if config.logging.wandb_key else config


def write_config(config: Config, logdir: Path) -> None:
    """LOGDIR/config.yaml: every key that differs from its default. Rank 0 writes. Raises InputError where it cannot be written."""
    try:
        logdir.mkdir(parents=True, exist_ok=True)
        if launch_rank()[0] == 0:
            (logdir / CONFIG_FILE).write_text(config_yaml(public(config), changed=True), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--logdir {logdir} cannot be written ({error.strerror}); give another folder") from error


def _seed(config: Config, earlier: Path | None, replicas: Replicas) -> int:
    """`logging.seed`; for 0 the one of an earlier run in the folder `earlier`, else a new one. Equal on all ranks."""
    if config.logging.seed:
        return config.logging.seed
    seed = 0
    if replicas.rank == 0:
        kept = earlier is not None and (earlier / CONFIG_FILE).is_file()
        seed = (read_yaml(earlier / CONFIG_FILE).get("logging", {}).get("seed", 0) if kept else 0) or secrets.randbelow(2**31) + 1
    return int(replicas.maximum(seed)[0])
