"""Seconds and memory of distillation: the trainer's own steps, on networks of random weights and films of random words.

Timed are whole optimizer steps of either player as `train.trainer.Loop` takes them: rollout, scores, backward, clip, optimizer. The text encoder is not there
(`infra.text_encoder_cpu_offload` frees its memory in a run); nor are data, evaluation and checkpoints.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import load_config
from ..config.root import Config
from ..config.show import config_table
from ..models.lora import branches
from ..models.spec import DiTDims, ModelSpec, model_spec
from ..models.wan_dit import WanDiT
from ..parallel.mesh import Mesh
from ..train.checkpoint import RunState
from ..train.clips import PaddedText
from ..train.distillation import DistillationTask
from ..train.films import Films, film_dtype, film_frames
from ..train.launch import launch, loop_settings
from ..train.trainer import Draw, Loop
from .networks import RandomWords, filled
from .record import Record, surroundings
from .timing import timed

PROMPT_TOKENS = 128
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """`steps` timed steps of each player after `warmup`; `layers` None: all blocks of the network."""

    config: Path
    overrides: tuple[str, ...] = ()
    steps: int = 3
    warmup: int = 1
    layers: int | None = None


class RandomFilms:
    """Satisfies `train.films.FilmSource`: every chunk has words of its own, and every third begins a shot."""

    title = "random words"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device, self.frames = config, device, film_frames(config)

    def load(self, dims: DiTDims) -> None:
        dtype = film_dtype(self.config, self.device)
        words = RandomWords(min(PROMPT_TOKENS, dims.text_len), dims.text_dim, self.device, dtype)
        words.text_dim, words.text_len = dims.text_dim, dims.text_len
        self.text = PaddedText(dims, words, dtype, self.device)

    def prepare(self) -> None:
        pass

    def example(self, number: int, chunks: int) -> Films:
        batch = self.config.training.batch_size
        words = self.text.rows([f"{number} {film} {chunk}" for film in range(batch) for chunk in range(chunks)])
        first = None
        if self.config.algorithm.i2v:
            first = torch.randn(batch, 1, *self.config.data.image_or_video_shape[2:], device=self.device)
        return Films(cuts=(tuple(chunk > 0 and chunk % 3 == 0 for chunk in range(chunks)),) * batch, words=words, first_B1CHW=first)

    def draw(self, draw: Draw, chunks: int) -> Films:
        return self.example(draw.step, chunks)

    def state(self) -> dict:
        return {}

    def restore(self, state: dict) -> None:
        pass


def bench_distil(settings: DistilSettings, path: Path | None, report: Callable[[str], None]) -> list[dict]:
    """One row per player; every rank of a launch calls it, the first reports and writes."""
    config = load_config(settings.config, [*settings.overrides, "logging.seed=1", "evaluation.interval=0"])
    spec = model_spec(config.model_kwargs.model_name)
    spec = spec if settings.layers is None else replace(spec, dit=replace(spec.dit, layers=settings.layers))

    def random_network(place: Path, config: Config, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> WanDiT:
        return filled(lambda: WanDiT(dims), device, dtype).requires_grad_(dtype == torch.float32)

    dims = spec.dit

    def task(config: Config, device: torch.device, mesh: Mesh) -> DistillationTask:
        made = DistillationTask(config, device, mesh, films=RandomFilms(config, device), networks=random_network)
        made.films.prepare()
        for _, branch in branches(made.module):  # products with zeros are faster
            torch.nn.init.normal_(branch.b, std=0.01)
        return made

    with launch(config, task, None) as ready, tempfile.TemporaryDirectory() as folder:
        return _measured(settings, ready, Path(folder), path, report if ready.replicas.rank == 0 else lambda line: None)


def _measured(settings: DistilSettings, ready, folder: Path, path: Path | None, report: Callable[[str], None]) -> list[dict]:
    task, config, device = ready.task, ready.config, ready.device
    head = {"benchmark": "distil", "config": config_table(config, changed=True), "estimate_gib": round(task.memory.peak / GIB, 2)}
    head |= {"dp": ready.mesh.dp_size, "sp": ready.mesh.sp_size, **surroundings(device, ready.mesh.size)}
    record = Record(path, head, writes=ready.replicas.rank == 0)
    how = {"config": {}, "replicas": ready.replicas, "stream": ready.mesh.dp_rank, "auto_resume": False}
    loop = Loop(task, loop_settings(config, save=False), folder, **how)
    rows = []
    report(f"{'player':16s}{'seconds':>10s}{'least':>10s}{'peak GiB':>10s}")
    for number, player in enumerate(loop.players):
        record.start({"player": player.name})
        taken = []
        for step in range(settings.warmup + settings.steps):
            if step == settings.warmup and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            loop.state = RunState(step)  # its exit step, the same for both players
            taken.append(timed(lambda: loop.learn(number, player), device)[0])
        seconds = ready.replicas.maximum(*taken[settings.warmup :])
        peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
        row = {"player": player.name, "seconds": statistics.median(seconds), "least": min(seconds), "peak_gib": ready.replicas.maximum(peak)[0]}
        record.finish(row)
        rows.append(row)
        report(f"{player.name:16s}{row['seconds']:10.3f}{row['least']:10.3f}{row['peak_gib']:10.2f}")
    return rows
