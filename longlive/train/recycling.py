"""Error recycling: a step shows the network its own earlier errors and asks it to steer back (spec training §4).

`perturb` adds kept errors to the noise, to the noised latents and to the clean history of a batch; `observe` keeps the errors of the forward that followed.
    noise     noise' = noise + e; the noised copy and the target are both made from it
    latents   the noised copy is made from clean + e, the target still from clean
    history   clean + e
Coins fall per sample. All draws follow from the micro-step's host generator, so that ranks that share a sample do the same, and a resumed run repeats.

Legend: B batch, F latent frames, c chunks, f latent frames of a chunk, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..core.errors import ConfigError
from ..core.log import environment, logger
from ..diffusion.flow import train_table
from ..parallel.mesh import Mesh
from ..parallel.shard import Layout
from .error_buffer import BufferSizes, ErrorBuffer, Pick, merged
from .guards import device_memory
from .objective import FlowTarget, per_frame

if TYPE_CHECKING:
    from ..config.root import Config
    from ..config.training import ErrorRecycling

LATENT, NOISE = "latent", "noise"
DEVICE_SHARE = 1 / 16  # of a GPU's memory: buffers up to this size stay on it, larger ones are kept in host memory


@dataclass(frozen=True)
class Perturbed:
    """What the network is shown, and what `observe` must know about it.

    flows, context_BFCHW   in place of those that were given; float32
    clean_BFCHW            the latents without errors
    sigma_BF               per copy, float32: the level of the table, at which the copy was mixed
    index, counts          per copy, sample and chunk: table index, and whether any frame of the chunk counts in the loss
    store_B                whether the errors of a sample are kept
    shares                 share of samples (and copies) that were left clean, and that were given errors of each kind
    """

    flows: tuple[FlowTarget, ...]
    context_BFCHW: torch.Tensor
    clean_BFCHW: torch.Tensor
    sigma_BF: tuple[torch.Tensor, ...]
    index: list[list[list[int]]]
    counts: list[list[list[bool]]]
    store_B: list[bool]
    shares: dict[str, float]
    rng: random.Random


class Recycler:
    """The two buffers of a run and the rules of their use. `sigmas` is the training table's; `chunks` the most chunks of a film.

    Raises ConfigError where the buffers do not fit.
    """

    def __init__(
        self,
        settings: "ErrorRecycling",
        *,
        sigmas: torch.Tensor,
        entry: tuple[int, ...],
        chunks: int,
        device: torch.device,
        mesh: Mesh = Mesh(),
        store: torch.device | str = "cpu",
    ):
        self.settings, self.device, self.mesh = settings, torch.device(device), mesh
        self.sigmas = sigmas.to(self.device, torch.float32)
        self.sizes = buffer_sizes(settings, entry, chunks, mesh)
        rules = {"modulate": settings.modulate_factor, "replacement": settings.replacement_strategy, "device": store}
        self.buffers = {kind: ErrorBuffer(self.sizes, **rules) for kind in (LATENT, NOISE)}

    def perturb(
        self,
        step: int,
        host: torch.Generator,
        clean_BFCHW: torch.Tensor,
        flows: Sequence[FlowTarget],
        index_Bc: Sequence[torch.Tensor],
        context_BFCHW: torch.Tensor,
    ) -> Perturbed:
        """The batch with errors put in. `flows` and `index_Bc` have one element per noised copy; frames that are given clean (level 0) stay so.

        Reads the indices back to the host, once. Every rank that shares the samples must call it, with equal arguments.
        """
        s, rng = self.settings, random.Random(int(torch.randint(2**62, (), generator=host)))
        index, counts = _on_host(flows, index_Bc)
        batch, copies, ready = range(len(clean_BFCHW)), range(len(flows)), step >= s.start_step
        clean_B = [ready and rng.random() < s.clean_prob for _ in batch]
        store_B = [not clean or rng.random() < s.clean_buffer_update_prob for clean in clean_B]

        def coin(b: int, probability: float) -> bool:
            return ready and not clean_B[b] and rng.random() < probability

        noises = [[self._of_levels(NOISE, index[k][b], rng) if coin(b, s.noise_prob) else None for b in batch] for k in copies]
        latents = [[self._of_levels(LATENT, index[k][b], rng) if coin(b, s.latent_prob) else None for b in batch] for k in copies]
        history = [self._of_any_level(len(index[0][b]), rng) if coin(b, s.context_prob) else None for b in batch]

        known_BF = torch.stack([flow.sigma_BF == 0 for flow in flows]).any(0)
        sigma_BF = tuple(per_frame(self.sigmas[i.to(self.device)], clean_BFCHW.shape[1] // i.shape[1]) for i in index_Bc)
        shown = tuple(self._shown(*parts) for parts in zip(flows, sigma_BF, noises, latents))
        shares = {
            "er_clean": sum(clean_B) / len(clean_B),
            "er_noise": _given(sample for copy in noises for sample in copy),
            "er_latent": _given(sample for copy in latents for sample in copy),
            "er_context": _given(history),
        }
        context = _plus(context_BFCHW, self._errors(LATENT, history), known_BF)
        return Perturbed(shown, context, clean_BFCHW, sigma_BF, index, counts, store_B, shares, rng)

    def _of_levels(self, kind: str, index_c: list[int], rng: random.Random) -> list[Pick | None]:
        """An error of each chunk's own noise level (and position)."""
        return [self.buffers[kind].pick(index, rng, chunk) for chunk, index in enumerate(index_c)]

    def _of_any_level(self, chunks: int, rng: random.Random) -> list[Pick | None]:
        """An error of any noise level for each chunk of the history (of its position)."""
        skipped = int(self.settings.skip_block_0)
        return [None] * skipped + [self.buffers[LATENT].pick_any(rng, chunk) for chunk in range(skipped, chunks)]

    def _shown(self, flow: FlowTarget, sigma_BF: torch.Tensor, noise: list, latent: list) -> FlowTarget:
        """The copy mixed anew: mixing is linear, so errors are added to it in the shares of clean and noise."""
        known_BF, sigma = flow.sigma_BF == 0, sigma_BF[..., None, None, None]
        e_noise, e_latent = self._errors(NOISE, noise), self._errors(LATENT, latent)
        noisy = _plus(flow.noisy_BFCHW, None if e_noise is None else sigma * e_noise, known_BF)
        noisy = _plus(noisy, None if e_latent is None else (1 - sigma) * e_latent, known_BF)
        return replace(flow, noisy_BFCHW=noisy, target_BFCHW=_plus(flow.target_BFCHW, e_noise, known_BF))

    def _errors(self, kind: str, picks: list[list[Pick | None] | None]) -> torch.Tensor | None:
        """float32 [B, F, C, H, W] of drawn errors, zero where there are none; None when there are none at all. Adds up over ranks that share samples."""
        chunks = max((len(sample) for sample in picks if sample is not None), default=0)
        flat = [pick for sample in picks for pick in (sample if sample is not None else [None] * chunks)]
        if not any(pick is not None for pick in flat):
            return None
        values = self.buffers[kind].values(flat, self.device)
        if self.mesh.sp_group is not None:
            dist.all_reduce(values, group=self.mesh.sp_group)
        return values.unflatten(0, (len(picks), chunks)).flatten(1, 2)

    @torch.no_grad()
    def observe(self, step: int, shown: Perturbed, velocities: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keeps the errors of the network's answers [B, F, C, H, W], one per noised copy of the whole film. Returns columns for the metrics.

        Up to step `buffer_warmup_iter` every data-parallel rank keeps the errors of all; every rank must call it then. Chunks of which no
        frame counts (padding), and errors that are not finite, are not kept; frames that do not count are kept as no error.
        """
        gather = self._gather if self.mesh.dp_size > 1 and step <= self.settings.buffer_warmup_iter else _alone
        for k, velocity in enumerate(velocities):
            errors = dict(zip((LATENT, NOISE), self._made(shown, k, velocity.float())))
            sound_Bc = torch.stack([e.isfinite().flatten(2).all(2) for e in errors.values()]).all(0)
            kept = torch.tensor([[store and count for count in row] for store, row in zip(shown.store_B, shown.counts[k])], device=self.device) & sound_Bc
            about = gather(torch.stack([kept.long(), torch.tensor(shown.index[k], device=self.device)])).tolist()
            for kind, error in errors.items():
                self._keep(self.buffers[kind], error.to(torch.bfloat16), about, gather, shown.rng)
        columns = {**shown.shares, "er_entries": float(len(self.buffers[LATENT]))}
        return {name: torch.full((), value, device=self.device) for name, value in columns.items()}

    def _made(self, shown: Perturbed, copy: int, velocity: torch.Tensor) -> Iterator[torch.Tensor]:
        """Latent and noise error [B, c, f, C, H, W] of one answer: x0_pred - x0, and (1 - sigma)(v - target)."""
        flow, sigma = shown.flows[copy], shown.sigma_BF[copy][..., None, None, None]
        counting = (flow.mask_BF != 0)[..., None, None, None]
        for error in (flow.noisy_BFCHW - sigma * velocity - shown.clean_BFCHW, (1 - sigma) * (velocity - flow.target_BFCHW)):
            yield torch.where(counting, error, 0.0).unflatten(1, (-1, self.sizes.entry[0]))

    def _keep(self, buffer: ErrorBuffer, error: torch.Tensor, about: list, gather: Callable, rng: random.Random) -> None:
        """Chunk by chunk, so that what other ranks send is a chunk at a time. `about`: per rank (kept, index) of each sample and chunk."""
        for chunk in range(error.shape[1]):
            of_ranks = gather(error[:, chunk])
            todo = [(r, b, index[b][chunk]) for r, (kept, index) in enumerate(about) for b in range(len(error)) if kept[b][chunk]]
            held = [(r, b) for r, b, i in todo if buffer.holds(buffer.key(i, chunk))]
            entries = iter(of_ranks[tuple(torch.tensor(held, device=error.device).T)].to(buffer.device)) if held else iter(())
            for _, _, i in todo:
                buffer.add(next(entries) if buffer.holds(buffer.key(i, chunk)) else None, i, rng, chunk)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[dp, ...]: the tensors of the data-parallel ranks, in rank order."""
        gathered = tensor.new_empty(self.mesh.dp_size, *tensor.shape)
        dist.all_gather(list(gathered.unbind()), tensor.contiguous(), group=self.mesh.grid.get_group("dp"))
        return gathered

    def state_dict(self) -> dict:
        """This rank's share of both buffers. Ranks that share a sample have equal counts and different entries."""
        return {kind: buffer.state_dict() for kind, buffer in self.buffers.items()}

    def load_state_dict(self, state: dict) -> None:
        """Exactly what `state_dict` gave on this rank; or, on other ranks, what `merged_states` gave. Raises CheckpointError for other sizes."""
        for kind, buffer in self.buffers.items():
            buffer.load_state_dict(state[kind])


def merged_states(states: Sequence[dict]) -> dict:
    """One state of the whole buffers from the `state_dict`s of all ranks of one sp group."""
    return {kind: merged([state[kind] for state in states]) for kind in (LATENT, NOISE)}


def whole_velocities(velocity_BfCHW: torch.Tensor, mesh: Mesh, layout: Layout) -> list[torch.Tensor]:
    """[B, F, C, H, W] of each noised copy from what `sharded_velocity` gave on every rank of the group; for a balanced layout."""
    copies = replace(layout, streams=layout.streams - 1)
    return list(copies.unshard(list(mesh.gather(velocity_BfCHW))).chunk(copies.streams, dim=1))


def buffer_sizes(settings: "ErrorRecycling", entry: tuple[int, ...], chunks: int, mesh: Mesh = Mesh()) -> BufferSizes:
    """Sizes of each of the two buffers on this rank."""
    positions = chunks if settings.enable_position_bucketing else 0
    return BufferSizes(
        buckets=settings.num_buckets, capacity=settings.max_size_per_bucket, entry=tuple(entry), positions=positions, rank=mesh.sp_rank, ranks=mesh.sp_size
    )


def recycler(config: "Config", chunks: int, mesh: Mesh, device: torch.device) -> Recycler | None:
    """The recycler that `training.error_recycling` asks for, or None. `chunks`: of a training film. Says once how much memory it may take.

    Buffers stay on the GPU where they take little of it, else in host memory. Raises ConfigError where the host has less than a run can fill.
    """
    s = config.training.error_recycling
    if not s.enabled:
        return None
    entry = (config.chunk_frames, *config.data.image_or_video_shape[2:])
    full = 2 * buffer_sizes(s, entry, chunks, mesh).nbytes
    total = device_memory(device) if device.type == "cuda" else 0
    store = device if full <= total * DEVICE_SHARE else torch.device("cpu")
    reached = min(full, reachable_bytes(config, entry, chunks, mesh.dp_size))
    if store.type == "cpu":
        check_memory(reached * int(environment("LOCAL_WORLD_SIZE", "1")), device_memory(store), s.max_size_per_bucket)
    logger.info("error recycling: at most %.2f GB in this run (%.2f GB when full) on %s, in each process", reached / 1e9, full / 1e9, store)
    sigmas = train_table(config.model_kwargs.timestep_shift).sigmas
    return Recycler(s, sigmas=sigmas, entry=entry, chunks=chunks, device=device, mesh=mesh, store=store)


def reachable_bytes(config: "Config", entry: tuple[int, ...], chunks: int, dp_size: int) -> float:
    """Bytes that the run's steps can put into both buffers of a process, whatever their sizes; infinite for a run limited by time."""
    t = config.training
    if not t.max_iters:
        return float("inf")
    gathered = min(t.max_iters, t.error_recycling.buffer_warmup_iter + 1) * (dp_size - 1)
    samples = (t.max_iters + gathered) * t.gradient_accumulation_steps * t.batch_size
    one = BufferSizes(buckets=1, capacity=1, entry=entry).nbytes
    return 2.0 * samples * t.noisy_copies * chunks * one


def check_memory(needed: float, memory: int, capacity: int) -> None:
    """Raises ConfigError when the error buffers of this host's processes, `needed` bytes, exceed its `memory`."""
    if needed > memory:
        have = f"the error buffers of this host's processes can grow to {needed / 1e9:.0f} GB, and it has {memory / 1e9:.0f} GB"
        raise ConfigError(f"{have}; lower training.error_recycling.max_size_per_bucket({capacity}) or num_buckets")


def _on_host(flows: Sequence[FlowTarget], index_Bc: Sequence[torch.Tensor]) -> tuple[list, list]:
    """Indices, and whether a chunk counts, as lists [copies][B][c]; one transfer."""
    counts = [(flow.mask_BF != 0).unflatten(1, (index.shape[1], -1)).any(2) for flow, index in zip(flows, index_Bc)]
    both = torch.stack([torch.stack([index.to(count.device), count.long()]) for index, count in zip(index_Bc, counts)]).tolist()
    return [copy[0] for copy in both], [[[bool(c) for c in row] for row in copy[1]] for copy in both]


def _plus(x: torch.Tensor, error: torch.Tensor | None, known_BF: torch.Tensor) -> torch.Tensor:
    """x + error, but for frames that are known."""
    return x if error is None else x + error.masked_fill(known_BF[..., None, None, None], 0.0)


def _given(picks) -> float:
    """Share of the samples in which at least one chunk got an error."""
    given = [sample is not None and any(pick is not None for pick in sample) for sample in picks]
    return sum(given) / len(given)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None]
