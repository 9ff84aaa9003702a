"""Evaluation while training: films of held-out prompts, the loss on held-out clips, and the judge's scores when the data is the world.

All of it runs on a copy of the weights, in the precision of generation, through the same `Session` that users have. The module that trains is only read
from: its mode, its compiled graphs and its shards stay as they are, and so do all global random states. Films and clips are shared out over all ranks.

Legend: T pixel frames, H W pixel rows and columns.
"""

from __future__ import annotations

import importlib.util
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..core.errors import InputError
from ..core.log import logger, warn_once
from ..core.story import Storyboard
from ..data.prompts import read_path
from ..engine.naming import prompts_text
from ..engine.parts import CPU_GROUP, check_decode, decode_as_configured, decode_dtype, load_text_encoder
from ..engine.pipeline import Pipeline, choose_dtype
from ..engine.session import Request
from ..engine.sinks import LatentsSink, Mp4Sink, VideoSink, beside, write_failed, write_text
from ..engine.sources import source_settings
from ..models.codec import VideoCodec
from ..models.light_vae import read_codec
from ..models.spec import model_spec
from ..models.text import TextEncoder
from ..models.wan_dit import WanDiT
from ..models.weights import build_on_meta
from ..parallel.fsdp import whole
from ..parallel.mesh import Mesh
from ..world.judge import ATTRIBUTES, Judge, score_film
from ..world.story import WorldStory, evaluation_story
from .low_precision import as_trained
from .start import training_vae
from .validation import HeldOutClip, ValidationLoss, held_out

if TYPE_CHECKING:
    from ..config.root import Config

FILMS, SHOTS, SEED = 4, 3, 0
PATIENCE = timedelta(days=7)  # ranks wait for the slowest film; a rank that dies closes its connections, which ends the wait at once


@dataclass(frozen=True, kw_only=True)
class FilmPlan:
    """One film to make. `story`: its truth, where the data is the world; `chunks` its length."""

    index: int
    board: Storyboard
    chunks: int
    story: WorldStory | None = None


class Evaluator:
    """Made once by every rank of a run; what it needs is loaded at the first `run`.

    `codec`, `text_encoder`: those that the run already has, where they are large and not compiled; else it loads its own.
    """

    def __init__(
        self,
        config: "Config",
        logdir: Path,
        device: torch.device,
        mesh: Mesh = Mesh(),
        *,
        codec: VideoCodec | None = None,
        text_encoder: TextEncoder | None = None,
    ):
        self.config, self.folder, self.device, self.mesh = config, Path(logdir) / "evaluation", torch.device(device), mesh
        self.spec, self.dtype = model_spec(config.model_kwargs.model_name), choose_dtype(config, self.device)
        self.world = config.data.data_path is None and not self.spec.folder
        self.rank = dist.get_rank() if mesh.size > 1 else 0
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if mesh.size > 1 else None
        self.codec, self.encoder = codec, text_encoder
        self.validation, self.clips, self.judge = ValidationLoss(config, self.device), None, None

    def due(self, step: int) -> bool:
        """Whether the configuration asks for an evaluation after this many steps."""
        return self.config.evaluation.interval > 0 and step > 0 and step % self.config.evaluation.interval == 0

    def check(self) -> None:
        """Before a run, rather than at its first evaluation.

        Raises InputError where there are no prompts to make films of or no VAE to show them, ConfigError where the device cannot decode as configured.
        """
        check_decode(self.config, self.device)
        self._plans()
        vae = training_vae(self.config, self.spec)
        if self.codec is None and not vae.exists():
            raise InputError(f"evaluation needs the VAE {vae}, which is missing; put it there, or set evaluation.interval: 0")

    def run(self, module: nn.Module, ema: Mapping[str, torch.Tensor], step: int, *, raw: Mapping[str, torch.Tensor] | None = None) -> dict[str, float]:
        """Numbers for the metrics, equal on every rank; films are in LOGDIR/evaluation/step_{step:06d}/. Every rank must call it.

        `ema`: the average's tensors by parameter name, evaluated beside the weights where `evaluation.use_ema` asks for it and there are any.
        `raw`: the weights, where they are not `module`'s own parameters. Raises InputError where a film cannot be written.
        """
        began, columns = time.perf_counter(), {}
        raw = {name: parameter.detach() for name, parameter in module.named_parameters()} if raw is None else raw
        sets = [("", raw)] + ([("_ema", ema)] if self.config.evaluation.use_ema and ema else [])
        with _apart(self.device):
            self._prepare()
            for suffix, tensors in sets:
                found = self._evaluate(self._copy(module.dims, tensors), self.folder / f"step_{step:06d}", suffix)
                columns |= {name + suffix: value for name, value in found.items()}
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        columns["eval_seconds"] = self._total(torch.tensor([time.perf_counter() - began], dtype=torch.float64)).item() / self.mesh.size
        logger.info("evaluation at step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in columns.items()))
        return columns

    def _total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks of a CPU tensor. It is also where they wait for each other, for as long as it takes."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def _prepare(self) -> None:
        """Codec, text encoder, judge and this rank's clips; once."""
        if self.clips is not None:
            return
        if self.codec is None:
            group = CPU_GROUP if self.device.type == "cpu" else 0
            dtype = decode_dtype(self.config, self.device)
            self.codec = read_codec(training_vae(self.config, self.spec), self.spec.vae, device=self.device, dtype=dtype, group=group)
        decode_as_configured(self.config, self.codec)
        if self.encoder is None:
            self.encoder = load_text_encoder(self.spec, self.device, self.dtype)[0]
        self.judge = Judge.load(self.device) if self.world else None
        if self.rank:  # the first rank indexes the videos, the others read its index
            self._total(torch.zeros(1))
        source = held_out(self.config, self.world)
        if not self.rank:
            self._total(torch.zeros(1))
        if source is None:
            warn_once("no validation loss: data.eval_data_path is no folder with video/ and caption/ of held-out clips")
        own = range(self.rank, 0 if source is None else len(source), self.mesh.size)
        self.clips: list[HeldOutClip] = [clip for number in own if (clip := source.clip(number, self.codec)) is not None]
        self.plans = self._plans()

    def _copy(self, dims, tensors: Mapping[str, torch.Tensor]) -> WanDiT:
        """An eager network of its own with these weights. Sharded ones are gathered one by one, so ranks meet here first."""
        self._total(torch.zeros(1))
        dit = build_on_meta(lambda: WanDiT(dims)).to(self.dtype).to_empty(device=self.device)
        for name, parameter in dit.named_parameters():
            parameter.copy_(whole(tensors[name]))
        as_trained(self.config, dit, self.spec)
        return dit.eval().requires_grad_(False)

    def _evaluate(self, dit: WanDiT, folder: Path, suffix: str) -> dict[str, float]:
        sums = self.validation.sums(dit, self.encoder, self.clips)
        parts = Pipeline.unloaded(self.config, self.device, self.dtype)
        pipeline = replace(parts, spec=replace(self.spec, dit=dit.dims), dit=dit, codec=self.codec, text_encoder=self.encoder)
        scores = torch.zeros(len(ATTRIBUTES) + 1, dtype=torch.float64)
        for batch in self._batches():
            for plan, frames in zip(batch, self._films(pipeline, batch, folder, suffix)):
                if plan.story is not None:
                    found = score_film(self.judge.read(frames, plan.story.shot_starts), plan.story)
                    scores += torch.tensor([*(found[name] for name in ATTRIBUTES), 1.0], dtype=torch.float64)
        total = self._total(torch.cat((sums.flatten(), scores)))
        sums, scores = total[: sums.numel()].reshape(sums.shape), total[sums.numel() :]
        columns = self.validation.columns(sums) if sums[0, 2] > 0 else {}
        judged = scores[-1].item()
        return columns | ({f"judge_{name}": value / judged for name, value in zip(ATTRIBUTES, scores.tolist())} if judged else {})

    # ------------------------------------------------------------ films

    def _plans(self) -> list[FilmPlan]:
        """All films of an evaluation: every prompt in every length that `evaluation.num_frames` names."""
        data, n = self.config.data, self.config.chunk_frames
        usual = self.config.world.chunks if self.world else data.image_or_video_shape[1] // n
        asked = self.config.evaluation.num_frames
        lengths = [frames // n or usual for frames in (asked if isinstance(asked, tuple) else (asked,))]
        if self.world:
            stories = [evaluation_story(SEED, i, chunks=c, shots=(min(SHOTS, c),) * 2) for c in lengths for i in range(FILMS)]
            return [FilmPlan(index=i % FILMS, board=s.storyboard(), chunks=s.chunks, story=s) for i, s in enumerate(stories)]
        path = data.eval_data_path
        if path is None:
            raise InputError("evaluation.interval needs prompts; set data.eval_data_path, or evaluation.interval: 0")
        settings = replace(source_settings(self.config), i2v=self.config.algorithm.i2v)
        plans = [FilmPlan(index=i, board=board, chunks=c) for c in lengths for i, board in enumerate(read_path(path, c, settings))]
        if path == data.data_path:  # the key's default: of the training set's captions, the first few
            logger.info("data.eval_data_path is the training data: films of its first %d captions", FILMS)
            return [plan for plan in plans if plan.index < FILMS]
        return plans

    def _batches(self) -> Iterator[list[FilmPlan]]:
        """This rank's films, up to `evaluation.val_batch_size` of one length at a time."""
        own, size = self.plans[self.rank :: self.mesh.size], self.config.evaluation.val_batch_size
        for chunks in dict.fromkeys(plan.chunks for plan in own):
            same = [plan for plan in own if plan.chunks == chunks]
            yield from (same[at : at + size] for at in range(0, len(same), size))

    def _films(self, pipeline: Pipeline, batch: Sequence[FilmPlan], folder: Path, suffix: str) -> list[torch.Tensor | None]:
        """Makes and writes the films of one batch. Returns their frames, uint8 [T, H, W, 3], where the judge wants them."""
        latents_only = self.config.evaluation.save_latents_only
        folder.mkdir(parents=True, exist_ok=True)
        several = isinstance(self.config.evaluation.num_frames, tuple) and len(self.config.evaluation.num_frames) > 1
        names = [f"film_{plan.index:03d}" + (f"_{plan.chunks * self.config.chunk_frames}f" if several else "") for plan in batch]
        sinks = [_sink(folder / f"{name}{suffix}", latents_only) for name in names]
        boards, indices = tuple(plan.board for plan in batch), tuple(plan.index for plan in batch)
        request = Request(storyboards=boards, chunks=batch[0].chunks, seed=SEED, indices=indices, decode=self.world or not latents_only)
        kept: list[list[torch.Tensor]] = [[] for _ in batch]
        try:
            with pipeline.session(request) as session:
                for name, plans in zip(names, session.plans):
                    write_text(folder / f"{name}_prompts.txt", prompts_text(plans))
                for chunk in session:
                    for number, sink in enumerate(sinks):
                        sink.write(None if chunk.frames is None else chunk.frames[number], chunk.latents_BFCHW[number])
                        if self.world:
                            kept[number].append(chunk.frames[number].cpu())
            for sink in sinks:
                sink.close()
        except BaseException:
            for sink in sinks:
                sink.abort()
            raise
        return [torch.cat(frames) if frames else None for frames in kept]


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Inside: no gradients, no autocast. Afterwards: these, and the random states of torch, Python and numpy, as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _sink(base: Path, latents_only: bool) -> VideoSink:
    if latents_only:
        return LatentsSink(base.with_name(base.name + ".pt"))
    if importlib.util.find_spec("av") is not None:
        return Mp4Sink(base.with_name(base.name + ".mp4"))
    warn_once("no av here: evaluation films are written as contact sheets")
    return SheetSink(base.with_name(base.name + ".png"))


class SheetSink:
    """The middle frame of every chunk on one page, PNG, row by row. Satisfies `VideoSink`; memory grows by a frame per chunk."""

    def __init__(self, path: Path):
        self.path, self.pictures = path, []

    def write(self, frames_THW3: torch.Tensor | None, z_FCHW: torch.Tensor | None = None) -> None:
        self.pictures.append(frames_THW3[len(frames_THW3) // 2].cpu())

    def close(self) -> Path:
        from PIL import Image

        columns = math.ceil(math.sqrt(len(self.pictures)))
        rows = math.ceil(len(self.pictures) / columns)
        height, width, _ = self.pictures[0].shape
        page = torch.zeros(rows, columns, height, width, 3, dtype=torch.uint8)
        page.flatten(0, 1)[: len(self.pictures)] = torch.stack(self.pictures)
        picture = Image.fromarray(page.transpose(1, 2).reshape(rows * height, columns * width, 3).numpy())
        try:
            picture.save(beside(self.path), format="PNG")
            return beside(self.path).replace(self.path)
        except OSError as error:
            self.abort()
            raise write_failed(self.path, error) from None

    def abort(self) -> None:
        beside(self.path).unlink(missing_ok=True)
