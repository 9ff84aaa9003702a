"""One training step of the generator as a run takes it, on a random film.

The network is built without memory and filled on the device, equal on all ranks; no matrix is zero, since products of zeros are faster. What follows is the
trainer's: `parallel.apply`, `train.film_step`, AdamW, moving average.

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..cache.attend import PLAIN, visible_tensor
from ..cache.policy import WindowPolicy
from ..core.geometry import CHUNK_FRAMES, Geometry
from ..diffusion.flow import TrainTable, train_table
from ..models.spec import DiTDims, ModelSpec
from ..models.weights import build_on_meta
from ..models.wan_dit import WanDiT, text_rows
from ..ops.merged_attention import part_kernel
from ..parallel.apply import Plan, apply
from ..parallel.data_parallel import Replicas
from ..parallel.fsdp import gradient_norm, is_sharded
from ..parallel.mesh import Mesh
from ..precision.training import FP8_TRAINED, NVFP4_TRAINED, Moment, TrainingConverter, weights_changed
from ..train.compiled import checkpoint_blocks, compile_blocks
from ..train.film_step import FilmStep
from ..train.low_precision import largest_of
from ..train.objective import draw_indices, flow_target
from ..train.optim import EMA, adamw
from ..train.sharded import film_layout
from ..train.teacher_forcing import Film, frame_positions

RECOMPUTE = ("none", "blocks")
PRECISIONS = {"bf16": None, "fp8": FP8_TRAINED, "nvfp4": NVFP4_TRAINED}
SHARDING = ("full", "hybrid_full", "hybrid_zero2", "no_shard")  # as infra.sharding_strategy
PROMPT_TOKENS = 128
SHIFT = 5.0


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """`recompute`: activations of no block or of all but the last `keep_blocks`; `keep_reads`: of those, so many keep what self-attention read.

    `window`: visible pages. `precision`: of linear layers' three products, an entry of `PRECISIONS`.
    """

    frames: int
    layout: str
    window: int | None = None
    fsdp: str = "full"
    recompute: str = "blocks"
    keep_reads: int = 0
    keep_blocks: int = 0
    compile: bool = False
    precision: str = "bf16"


class TrainingStep:
    """`take()` takes one step. `text_keys` is the number of keys of a prompt, `attention` names the kernels of self-attention, `loss` is the last step's."""

    streams = 2

    def __init__(self, spec: ModelSpec, dims: DiTDims, settings: StepSettings, mesh: Mesh, device: torch.device):
        self.dims, self.settings, self.mesh, self.device = dims, settings, mesh, device
        self.geometry = Geometry(spec.height, spec.width)
        self.mixed = device.type == "cuda"
        self.module, kind = random_generator(dims, device), PRECISIONS[settings.precision]
        if kind is not None:
            TrainingConverter(kind=kind, moment=Moment(reduce=largest_of(mesh))).convert(self.module, spec)
        plan = Plan(
            blocks=spec.block_patterns, entries=spec.entry_patterns, strategy=settings.fsdp, bf16=self.mixed,
            recompute=None if settings.recompute == "none" else partial(checkpoint_blocks, keep=settings.keep_blocks),
            compile=compile_blocks if settings.compile else None,
        )  # fmt: skip
        apply(self.module, device, plan)
        self.sharded = is_sharded(self.module)
        self.parameters = list(self.module.parameters())
        self.optimizer = adamw(self.parameters, lr=1e-5, betas=(0.0, 0.999), weight_decay=0.0)
        self.ema = EMA(self.module, 0.99)
        layout = film_layout(settings.frames, self.streams - 1, mesh, settings.layout)
        self.step = FilmStep(mesh, layout, settings.compile, settings.keep_reads if settings.recompute == "blocks" else 0)
        self.replicas = Replicas(rank=0, size=mesh.size)
        self.generator = torch.Generator(device).manual_seed(1000 + mesh.dp_rank)
        self.table = _on(train_table(SHIFT), device)
        self._film()
        sample = torch.empty(0, 0, 1, dims.head_dim, dtype=torch.bfloat16 if self.mixed else torch.float32, device=device)
        self.attention = "plain, over windows" if settings.window else part_kernel(sample) or PLAIN
        self.taken, self.loss = 0, float("nan")

    def _film(self) -> None:
        chunks, device = self.settings.frames // CHUNK_FRAMES, self.device
        cuts = [[False] * chunks]
        visible = None
        if self.settings.window:
            visible = visible_tensor(cuts, WindowPolicy(pages=self.settings.window, anchor=True, pin=True))
        shape = (1, self.settings.frames, self.dims.channels, self.geometry.latent_height, self.geometry.latent_width)
        self.latents = torch.randn(shape, generator=self.generator, device=device)
        prompts = torch.randn(chunks, min(PROMPT_TOKENS, self.dims.text_len), self.dims.text_dim, generator=self.generator, device=device)
        self.words = text_rows(list(prompts), self.dims, torch.float32)
        self.text_keys = int(self.words[1].isfinite().sum(1).max())  # visible ones
        self.film = Film(torch.arange(chunks, device=device)[None], frame_positions(cuts, CHUNK_FRAMES, 0.0).to(device), visible)

    def take(self) -> None:
        noise = torch.randn(self.latents.shape, generator=self.generator, device=self.device)
        index = draw_indices(1, self.settings.frames // CHUNK_FRAMES, self.generator)
        flows = [flow_target(self.latents, noise, index, self.table)]
        told = torch.zeros(self.latents.shape[:2], dtype=torch.float64, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext():
            text = self.module.text_context(*self.words)
            velocities = self.step.velocities(self.module, text, self.film, (self.latents, told), flows)
        loss, _ = self.step.loss(velocities, flows, None)
        loss.backward()
        if not self.sharded:
            self.replicas.average_gradients(self.module)
        norm = gradient_norm(self.parameters)
        nn.utils.clip_grads_with_norm_(self.parameters, 10.0, norm)
        self.optimizer.step()
        weights_changed(self.module)
        self.optimizer.zero_grad(set_to_none=True)
        self.taken += 1
        self.ema.update(self.module, self.taken)
        self.loss = loss.item()


def random_generator(dims: DiTDims, device: torch.device) -> WanDiT:
    """A network of random weights, float32 on `device`; norms are neutral. The same on every rank."""
    dit = build_on_meta(lambda: WanDiT(dims)).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))
    return dit


def _on(table: TrainTable, device: torch.device) -> TrainTable:
    return TrainTable(table.sigmas.to(device), table.timesteps.to(device), table.weights.to(device))
