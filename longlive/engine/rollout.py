"""One chunk of a film: open a page, sample, commit the clean chunk, remember the cut. The same steps for generation and distillation.

A rollout is causal: chunk n is sampled while attending to the pages of earlier chunks, then one more pass over the finished latents at
noise level 0 writes the keys and values that later chunks will read. Every sample of the batch has its own cuts, and so its own window
and shot offset. Ranks that make a film together share the forwards alone (`parallel.shared_chunk`). (Spec inference §2.)

Legend: B batch, F latent frames of a chunk, C, H, W latent channels, rows, columns.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from ..cache.attend import Cached
from ..cache.coded import CodedPages
from ..cache.pages import Pages
from ..cache.policy import Window, WindowPolicy
from ..cache.quantised import QuantisedPages
from ..core.errors import InputError
from ..core.log import logger
from ..core.tokens import Tokens
from ..diffusion.guidance import Branches, branches
from ..diffusion.known import KnownFrames, nothing_known
from ..diffusion.samplers import OnStep, sample, unipc
from ..models.patch import patchify, unpatchify
from ..models.wan_dit import Attend, NoiseLevels, TextContext, WanDiT
from ..ops.coded_attention import keeps_codes
from ..parallel.mesh import Mesh
from ..parallel.shared_chunk import SharedChunk
from .fixed import FixedForwards

UNSET_WINDOW_CHUNKS = 3


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How a film is rolled out. Lengths in latent frames.

    window_frames  what attention sees, own chunk included; whole chunks; -1 means three chunks
    sink_frames    0, or one chunk: keep chunk 0 visible for ever, and with `multi_shot` the first chunk of the current shot too
    shot_offset    temporal distance that every cut adds (absolute mode only)
    recache        a cut drops all pages but chunk 0 and its own once it is finished
    relative       positions count from the oldest visible chunk, instead of from the start of the film
    t_scale        factor on temporal positions
    guidance       classifier-free guidance scale, 1 = off; `batched_guidance`: both branches in one forward
    kv_format      how finished chunks keep their keys and values: fp8, int8 or nvfp4 (scale rule `kv_rule`); None: as they are
    kv_keep_sinks  anchor and pin are kept as they are, too
    attention      how self-attention is computed: auto, or another entry of `ops.attention.KERNELS`; for fp8 pages may hold the codes that it reads
    """

    chunk_frames: int = 8
    window_frames: int = 32
    sink_frames: int = 8
    multi_shot: bool = True
    shot_offset: float = 8.0
    recache: bool = False
    relative: bool = False
    t_scale: float = 1.0
    steps: int = 4
    shift: float = 5.0
    guidance: float = 1.0
    batched_guidance: bool = True
    kv_format: str | None = None
    kv_rule: str = "mse"
    kv_keep_sinks: bool = False
    attention: str = "auto"

    def __post_init__(self):
        f = self.chunk_frames
        if self.sink_frames not in (0, f):
            raise InputError(f"sink_size({self.sink_frames}) != num_frame_per_block({f}): a sink is whole pages of one chunk; use 0 or {f}")
        if self.window_frames != -1 and (self.window_frames < f or self.window_frames % f):
            near = max(1, round(self.window_frames / f)) * f
            raise InputError(
                f"local_attn_size({self.window_frames}) % num_frame_per_block({f}) != 0: a window is whole chunks; use {near}, or -1 for "
                f"{UNSET_WINDOW_CHUNKS} chunks"
            )
        unipc(self.steps, self.shift)

    @property
    def pages(self) -> int:
        return UNSET_WINDOW_CHUNKS if self.window_frames == -1 else self.window_frames // self.chunk_frames

    @property
    def policy(self) -> WindowPolicy:
        sink = self.sink_frames > 0
        return WindowPolicy(pages=self.pages, anchor=sink, pin=sink and self.multi_shot, recache=self.recache)

    def store(self, *sizes: int, device: torch.device, dtype: torch.dtype) -> Pages | QuantisedPages | CodedPages:
        """Memory for keys and values of (layers, batch, pages, tokens of a page, heads, head features)."""
        if self.kv_format is None:
            coded = self.attention == "fp8" and not self.relative and keeps_codes(device, sizes[3], sizes[5])
            if self.attention == "fp8" and device.type == "cuda" and sizes[3] % 16:
                logger.warning("inference.attention: fp8: a chunk of %d tokens is no multiple of 16; products of rounded values are made in bf16", sizes[3])
            return (CodedPages if coded else Pages)(*sizes, device=device, dtype=dtype)
        keep = {"keep_anchor": self.kv_keep_sinks and self.policy.anchor, "keep_pin": self.kv_keep_sinks and self.policy.pin}
        return QuantisedPages(*sizes, device=device, dtype=dtype, format=self.kv_format, rule=self.kv_rule, **keep)


@dataclass(frozen=True)
class RolloutState:
    """Where a rollout stands, besides its pages. `shots[b]` counts the cuts so far."""

    chunk: int
    shots: tuple[int, ...]
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class RolloutSnapshot:
    """An exact copy: state and the contents of every store."""

    state: RolloutState
    pages: tuple[list[torch.Tensor], ...]


class Rollout:
    """The memory of one batch of films, advanced by `step`, one chunk at a time.

    `first_frame` is the temporal position of the film's first latent frame; `dtype` that of pages and of the model. `fixed`: forwards at fixed
    addresses, recorded as CUDA graphs (`engine.fixed`). `mesh`: the ranks that make the film together, all of which must make the same calls; they exchange
    in every layer, which is not recorded. Raises InputError or ConfigError where they cannot share a chunk equally.
    """

    def __init__(
        self,
        dit: WanDiT,
        settings: RolloutSettings,
        *,
        token_height: int,
        token_width: int,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        first_frame: float = 0.0,
        fixed: bool = False,
        mesh: Mesh = Mesh(),
    ):
        if fixed and mesh.sp_size > 1:
            raise InputError(f"forwards that {mesh.sp_size} ranks share are not recorded; set inference.cuda_graphs to false or auto")
        self.dit, self.settings, self.batch = dit, settings, batch
        self.height, self.width = token_height, token_width
        self.device, self.first_frame = torch.device(device), first_frame
        self.schedule = unipc(settings.steps, settings.shift)
        self.state = RolloutState(0, (0,) * batch, (Window(),) * batch)
        guided = settings.guidance != 1.0
        passes, repeats = (2, 1) if guided and not settings.batched_guidance else (1, 2 if guided else 1)
        dims, page_tokens = dit.dims, settings.chunk_frames * token_height * token_width
        self.share = SharedChunk(mesh, settings.chunk_frames, dims.heads)
        sizes = (dims.layers, repeats * batch, settings.pages, page_tokens, self.share.heads, dims.head_dim)
        self.stores = tuple(settings.store(*sizes, device=self.device, dtype=dtype) for _ in range(passes))
        self.fixed = FixedForwards(dit, self.device) if fixed else None
        self.levels = _Levels(dit, self.share, settings.chunk_frames, self.device)
        if settings.window_frames == -1:
            logger.info("local_attn_size -1: attention sees a window of %d chunks", UNSET_WINDOW_CHUNKS)

    @torch.no_grad()
    def step(
        self,
        noise_BFCHW: torch.Tensor,
        text: TextContext,
        prompt_B: list[int],
        cut_B: list[bool],
        *,
        negative: int | None = None,
        known: KnownFrames | None = None,
        on_step: OnStep | None = None,
    ) -> torch.Tensor:
        """The next chunk's clean latents [B, F, C, H, W], float32.

        prompt_B   row of `text` per sample; `negative` the row of the negative prompt, needed when guidance is on
        cut_B      whether the chunk begins a shot (nothing to begin at chunk 0)
        known      the film's given first frames, however many chunks they span
        on_step    called after every sampler step as on_step(step, x_BFCHW, velocity_BFCHW), the sample before known frames are put back
        Nothing but the chunk's own slot changes until all is done: a step that raised can be repeated.
        """
        state, policy, f = self.state, self.settings.policy, self.settings.chunk_frames
        self._check(noise_BFCHW, prompt_B, cut_B)
        chunk = state.chunk
        cuts = [cut and chunk > 0 for cut in cut_B]
        shots = tuple(s + cut for s, cut in zip(state.shots, cuts))
        opened = [policy.open(w, chunk) for w in state.windows]
        closed = [policy.close(w, chunk, cut) for w, cut in zip(opened, cuts)]
        branch = branches(prompt_B, negative, self.settings.guidance, self.settings.batched_guidance)
        noise_BFCHW = upload(noise_BFCHW, self.device)
        if self.fixed is not None:
            self.fixed.begin()
        given = nothing_known(noise_BFCHW) if known is None else known.part(chunk * f, f)
        run = _ChunkRun(self, branch, self._tokens(chunk, shots), text, given)
        if given.frames < f:
            x = sample(run.denoiser(opened, chunk), noise_BFCHW, self.schedule, on_step)
        else:
            x = noise_BFCHW.to(torch.float32)
        x = given.clamp(x)
        run.commit(x, closed, chunk)
        self.state = RolloutState(chunk + 1, shots, tuple(closed))
        return x

    def snapshot(self) -> RolloutSnapshot:
        """An exact, independent copy of where the rollout stands."""
        return RolloutSnapshot(self.state, tuple(store.snapshot() for store in self.stores))

    def restore(self, snapshot: RolloutSnapshot) -> None:
        """Goes back to `snapshot`, in the same memory."""
        for store, contents in zip(self.stores, snapshot.pages, strict=True):
            store.restore(contents)
        self.state = snapshot.state

    def _tokens(self, chunk: int, shots: tuple[int, ...]) -> Tokens:
        f = self.settings.chunk_frames
        frame = self.first_frame + chunk * f + torch.arange(f, dtype=torch.float64)
        offset = torch.tensor(shots, dtype=torch.float64) * self.settings.shot_offset
        position = (offset[:, None] + frame).to(self.device, non_blocking=True)
        prompt = torch.zeros(self.batch, 1, dtype=torch.int64)
        return Tokens(position, torch.full((f,), chunk), torch.ones(f, dtype=torch.bool), prompt, self.height, self.width)

    def _check(self, noise: torch.Tensor, prompt_B: list[int], cut_B: list[bool]) -> None:
        want = (self.batch, self.settings.chunk_frames, self.dit.dims.channels, 2 * self.height, 2 * self.width)
        if tuple(noise.shape) != want:
            raise InputError(f"noise of shape {tuple(noise.shape)} for a rollout of {want} (batch, frames, channels, height, width)")
        if len(prompt_B) != self.batch or len(cut_B) != self.batch:
            raise InputError(f"{len(prompt_B)} prompts and {len(cut_B)} cut flags for a batch of {self.batch}; give one of each per sample")


class _Levels:
    """The embeddings of the few noise levels that a rollout meets, made once; again when the weights behind them have changed."""

    def __init__(self, dit: WanDiT, share: SharedChunk, frames: int, device: torch.device):
        self.dit, self.share, self.frames, self.device = dit, share, frames, device
        self._made: dict[tuple[float, int, int], NoiseLevels] = {}
        self._stamp = -1

    def of(self, sigma: float, given: KnownFrames, batch: int) -> NoiseLevels:
        """This rank's, for `batch` samples at `sigma`, whose `given` frames are at 0."""
        if self._stamp != (stamp := self.dit.level_stamp()):
            self._made.clear()
            self._stamp = stamp
        key = sigma, given.frames, batch
        if key not in self._made:
            told = torch.full((batch, self.frames), sigma, dtype=torch.float64, device=self.device)
            self._made[key] = self.dit.levels(self.share.own(given.levels(told)))
        return self._made[key]


class _ChunkRun:
    """The passes over one chunk: denoising steps against the opened windows, the commit against the closed ones."""

    def __init__(self, rollout: Rollout, branch: Branches, tokens: Tokens, text: TextContext, given: KnownFrames):
        self.rollout, self.branch, self.text, self.given = rollout, branch, text, given
        position = tokens.position_BF.repeat(branch.repeats, 1)
        self.tokens = [
            Tokens(position, tokens.chunk_F, tokens.noisy_F, torch.tensor(rows)[:, None].to(rollout.device, non_blocking=True), tokens.height, tokens.width)
            for rows in branch.passes
        ]
        self.own_tokens = [rollout.share.own_tokens(tokens) for tokens in self.tokens]

    def _attends(self, windows: list[Window], chunk: int, commit: bool = False) -> list[Attend]:
        r, windows = self.rollout, windows * self.branch.repeats
        options = {"relative": r.settings.relative, "t_scale": r.settings.t_scale, "commit": commit, "kernel": r.settings.attention}
        attends = [Cached(store, windows, chunk, tokens, r.dit.dims.head_dim, **options) for store, tokens in zip(r.stores, self.tokens)]
        return [r.share.attend(attend) for attend in attends]

    def _ask(self, x: torch.Tensor, sigma: float, attends: list[Attend], until: str) -> list[torch.Tensor]:
        """One forward per pass; latents in, velocities as latents out."""
        r = self.rollout
        own = r.share.own(x)
        x_BNc = patchify(own).repeat(self.branch.repeats, 1, 1)
        levels = r.levels.of(sigma, self.given, len(x_BNc))
        forward = r.fixed or r.dit
        outs = [forward(x_BNc, tokens, levels, self.text, attend, until) for tokens, attend in zip(self.own_tokens, attends)]
        return [] if until == "kv" else [r.share.whole(unpatchify(out, own.shape[1], r.height, r.width)) for out in outs]

    def denoiser(self, windows: list[Window], chunk: int):
        attends = self._attends(windows, chunk)

        def denoise(x_BFCHW: torch.Tensor, sigma: float) -> torch.Tensor:
            return self.branch.combine(self._ask(self.given.clamp(x_BFCHW), sigma, attends, "velocity"))

        return denoise

    def commit(self, x_BFCHW: torch.Tensor, windows: list[Window], chunk: int) -> None:
        self._ask(x_BFCHW, 0.0, self._attends(windows, chunk, commit=True), "kv")


def upload(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`t` on `device`, without a wait for the work that is queued there."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and t.device.type == "cpu" else t.to(device)


def chunk_noise(seed: int, prompt_index: int, sample: int, chunk: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise, float32 on the CPU, a function of its arguments alone: whatever the device, batch or world size."""
    name = f"{seed}/{prompt_index}/{sample}/{chunk}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=key.astype(np.uint64)))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
