"""Training: `run(config, logdir)` picks the trainer that `algorithm.trainer` names and runs its loop; `rehearse` tries one step of it.

`launch.py` makes everything ready, `trainer.py` is the loop, `objective.py` and `teacher_forcing.py` what a step computes, `diffusion.py` and
`vae.py` the tasks, `clips.py` what the first of them trains on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..config import Config, availability
from ..config.show import config_table
from ..core.errors import InputError
from .launch import launch, loop_settings, public, write_config
from .rehearsal import Rehearsal
from .trainer import Loop


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line decides about a run, apart from its configuration. `evaluate_only`: one evaluation of the weights, no step."""

    auto_resume: bool = True
    save: bool = True
    evaluate_only: bool = False
    wandb: bool = False
    wandb_dir: Path | None = None


def _run_task(task_class: Callable) -> Callable[[Config, Path, RunOptions], dict[str, float]]:
    def run_task(config: Config, logdir: Path, options: RunOptions) -> dict[str, float]:
        from .tracking import trackers

        with launch(config, task_class(logdir), logdir, resume=options.auto_resume) as ready:
            first = ready.replicas.rank == 0
            loop = Loop(
                ready.task,
                loop_settings(ready.config, options.save),
                logdir,
                config=config_table(public(ready.config)),
                replicas=ready.replicas,
                stream=ready.mesh.dp_rank,
                auto_resume=options.auto_resume,
                tracker=trackers(ready.config, logdir, wandb=options.wandb, wandb_dir=options.wandb_dir) if first else None,
            )
            if options.evaluate_only:
                loop.evaluate()
                return {}
            return loop.fit()

    return run_task


def _vae(logdir: Path | None) -> Callable:
    from .vae import VAETask

    return VAETask


def _diffusion(logdir: Path | None) -> Callable:
    from .lora_training import diffusion_task

    return partial(diffusion_task, logdir=logdir)


def _distillation(logdir: Path | None) -> Callable:
    from .distillation import DistillationTask

    return partial(DistillationTask, logdir=logdir)


def _judge(config: Config, logdir: Path, options: RunOptions) -> dict[str, float]:
    from ..world.judge_training import train_judge

    write_config(config, logdir)
    return train_judge(config, logdir) or {}


TRAINERS: dict[str, Callable[[Config, Path, RunOptions], dict[str, float]]] = {
    "diffusion": _run_task(_diffusion),
    "vae": _run_task(_vae),
    "judge": _judge,
    "score_distillation": _run_task(_distillation),
}


def run(config: Config, logdir: Path, options: RunOptions = RunOptions()) -> dict[str, float]:
    """Trains as `config` says, in `logdir`: metrics.jsonl, config.yaml, weights, and checkpoints to resume from.

    Returns the last measurements. Raises Interrupted (exit code 130) when asked to stop, after saving.
    """
    availability(config, "train")
    if options.evaluate_only and not (config.algorithm.trainer in ("diffusion", "score_distillation") and config.evaluation.interval > 0):
        needed = "trainer: diffusion or score_distillation and an evaluation.interval above 0"
        raise InputError(f"one evaluation needs {needed}; set them, or generate films with inference.py")
    return TRAINERS[config.algorithm.trainer](config, Path(logdir), options)


def rehearse(config: Config) -> Rehearsal:
    """Checks configuration, data and weights, estimates memory, and takes one step of the diffusion or distillation trainer. Writes nothing.

    Of the procedural world only as many clips are rendered as a batch holds. Raises InputError or ConfigError as `run` would.
    """
    from .rehearsal import rehearse as rehearse_task

    availability(config, "train")
    tasks = {"diffusion": _diffusion, "score_distillation": _distillation}
    if (kind := config.algorithm.trainer) not in tasks:
        raise InputError(f"a dry run is for trainers {' and '.join(tasks)}, not {kind}; train it with training.max_iters=1 in a folder of its own")
    return rehearse_task(config, tasks[kind](None))
