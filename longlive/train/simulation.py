"""Backward simulation: the student's own film, sampled as generation samples it, with gradients through one step of each chunk.

A chunk is denoised without gradients up to its exit step; there the network is asked once more, with gradients, and the clean latents that its velocity
points at are the chunk. They are committed at noise level 0, without gradients, for later chunks to read (spec training §6.2; D3, D5, D20); or, with
`Exits.finish`, the chunk goes on through its other steps first, so that later chunks read what they will read in generation.
Windows, pins, shot offsets and prompts are each sample's own (D9). A rollout may go on from where another ended. Ranks that share a sample hold
frames of a chunk while they compute and heads while they attend; latents are a thousandth of that, and whole on each.

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..cache.pages import Pages
from ..cache.policy import Window
from ..cache.rolled import RolledOut
from ..core.tokens import Tokens
from ..diffusion.flow import train_table
from ..diffusion.known import KnownFrames, nothing_known
from ..diffusion.samplers import Schedule, combine, unipc
from ..engine.fixed import FixedForwards
from ..engine.rollout import RolloutSettings
from ..models.patch import patchify, unpatchify
from ..models.wan_dit import Attend, NoiseLevels, TextContext, WanDiT
from ..parallel.gather import gather_frames
from ..parallel.mesh import Mesh
from ..parallel.shard import Layout
from ..parallel.ulysses import Ulysses

Commit = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a stretch of films shows. `cuts_Bc`: the chunk begins a shot; `prompt_Bc`: row of the text, int64 on the device."""

    cuts_Bc: Sequence[Sequence[bool]]
    prompt_Bc: torch.Tensor

    @property
    def chunks(self) -> int:
        return self.prompt_Bc.shape[1]


@dataclass(frozen=True, kw_only=True)
class Exits:
    """At which step each chunk ends, and through which chunks gradients go. `levels`: sigma of the clean estimate at each step, None: the solver's.

    `finish`: what is committed of a chunk has gone through all steps, whatever its exit.
    """

    steps: tuple[int, ...]
    first_with_gradients: int = 0
    levels: tuple[float, ...] | None = None
    finish: bool = False

    def bounds(self, schedule: Schedule, shift: float) -> tuple[int, int] | None:
        """(from, to): unshifted timesteps 0..1000 of the exit step and of the one after it (0 after the last); None where chunks differ."""
        if len(set(self.steps)) > 1:
            return None
        table, step = train_table(shift), self.steps[0]
        index = table.nearest(torch.tensor([float(t) for t in schedule.timesteps]))
        unshifted = [len(table.timesteps) - int(i) for i in index] + [0]
        return unshifted[step], unshifted[step + 1]


@dataclass(frozen=True)
class Standing:
    """Where a rollout stands: chunks made, cuts so far and window of each sample, and the slot of every chunk that is still seen, by sample."""

    chunk: int
    shots: tuple[int, ...]
    windows: tuple[Window, ...]
    slots: tuple[dict[int, int], ...]


class Rolled(NamedTuple):
    """`x_BFCHW`: latents at the exits, float32, with their graph. Constants: `read_BFCHW`, what was committed, or would have been; `asked_BFCHW`, the
    noisy latents that were asked about at the exits (None off-policy)."""

    x_BFCHW: torch.Tensor
    read_BFCHW: torch.Tensor
    asked_BFCHW: torch.Tensor | None = None


class StudentRollout:
    """The memory of one batch of rollouts, one segment of chunks after another. `phase()` surrounds every forward, with and without gradients."""

    def __init__(
        self,
        dit: WanDiT,
        settings: RolloutSettings,
        *,
        phase: Callable[[], AbstractContextManager] = nullcontext,
        wrap: Callable[[RolledOut], Attend] = lambda attend: attend,
        mesh: Mesh = Mesh(),
    ):
        self.dit, self.settings, self.phase, self.wrap, self.mesh = dit, settings, phase, wrap, mesh
        self.layout = Layout(film=settings.chunk_frames, ranks=mesh.sp_size)  # of one chunk
        self.schedule = unipc(settings.steps, settings.shift)
        self.pages: Pages | None = None
        self.standing: Standing | None = None

    def run(
        self,
        noise_BFCHW: torch.Tensor,
        script: Script,
        text: TextContext,
        exits: Exits,
        *,
        known: KnownFrames | None = None,
        before_commit: Commit | None = None,
        commit_level: float = 0.0,
        more: bool = False,
        stepper: Stepping | None = None,
    ) -> Rolled:
        """The films' clean latents at their exits, with a graph in the chunks from `exits.first_with_gradients` on, and as later chunks read them.

        known          given first frames
        before_commit  what is committed of a chunk, (number, latents) -> latents; None: the latents themselves. Told to be at `commit_level`
        more           another `run` will go on from here: the last chunk is committed too
        stepper        a copy of the network for all that needs no gradients; None: the network itself
        """
        chunks, f = script.chunks, self.settings.chunk_frames
        start = self._open(noise_BFCHW, chunks, Pages if stepper is None or stepper.recorded is None else stepper.recorded.pages)
        films, read, noisy, levels = [], [], [], {}
        for number in range(chunks):
            rows_B, learns = script.prompt_Bc[:, number], torch.is_grad_enabled() and number >= exits.first_with_gradients
            asked = Asked(self.dit, text.select(rows_B)) if learns or stepper is None else None
            free = asked if stepper is None else stepper.asked(rows_B, levels)
            run = _Chunk(self, start + number, [bool(row[number]) for row in script.cuts_Bc], noise_BFCHW, known, asked, free)
            x, clean, at_exit = run.sample(wide(noise_BFCHW[:, number * f : (number + 1) * f]), exits, number)
            films.append(x)
            read.append(clean)
            noisy.append(at_exit)
            if more or number + 1 < chunks:
                run.commit(clean if before_commit is None else run.known.clamp(before_commit(number, clean)), commit_level)
            self.standing = run.closed
        return Rolled(torch.cat(films, dim=1), torch.cat(read, dim=1), torch.cat(noisy, dim=1))

    def _open(self, noise: torch.Tensor, chunks: int, room: Callable[..., Pages]) -> int:
        """Makes `room` for `chunks` more chunks beside the ones that are still seen, and returns the first free slot."""
        batch, _, _, height, width = noise.shape
        dims, tokens, before = self.dit.dims, self.settings.chunk_frames * (height // 2) * (width // 2), self.standing
        kept, slots = ([], ({},) * batch) if before is None else self._carried()
        carried = max(map(len, slots))
        with self.phase():
            cast = torch.is_autocast_enabled(noise.device.type)
        dtype = torch.get_autocast_dtype(noise.device.type) if cast else self.dit.patch_embedding.weight.dtype
        heads = dims.heads // self.mesh.sp_size
        self.pages = room(dims.layers, batch, carried + chunks, tokens, heads, dims.head_dim, device=noise.device, dtype=dtype)
        for new, past in zip((*self.pages.k, *self.pages.v), kept):
            new[:, :carried] = past
        self.standing = Standing(0, (0,) * batch, (Window(),) * batch, slots) if before is None else replace(before, slots=slots)
        return carried

    def _carried(self) -> tuple[list[torch.Tensor], tuple[dict[int, int], ...]]:
        """Keys, then values of every layer, of the chunks that are still seen, oldest first; and the slots that this order gives them."""
        ordered = [sorted(slots) for slots in self.standing.slots]
        most = max(map(len, ordered))
        chosen = torch.tensor([[s[c] for c in o] + [0] * (most - len(o)) for s, o in zip(self.standing.slots, ordered)], dtype=torch.int64)
        rows = tuple(t.to(self.pages.k[0].device, non_blocking=True) for t in (torch.arange(len(ordered))[:, None], chosen))
        return [t[rows] for t in (*self.pages.k, *self.pages.v)], tuple({chunk: i for i, chunk in enumerate(o)} for o in ordered)

    def state(self) -> dict:
        """What a later segment depends on, as a tree of plain values and tensors. After a `run` with `more`."""
        tensors, slots = self._carried()
        s = self.standing
        windows = [[list(w.slots), w.pinned] for w in s.windows]
        plain = {"chunk": s.chunk, "shots": list(s.shots), "windows": windows, "chunks": [list(own) for own in slots]}
        return {"pages": {str(i): t for i, t in enumerate(tensors)}, "standing": plain}

    def restore(self, state: dict, device: torch.device) -> None:
        """Goes on from what `state` said."""
        tensors, s = [state["pages"][str(i)].to(device) for i in range(len(state["pages"]))], state["standing"]
        self.pages = Pages(len(tensors) // 2, *tensors[0].shape, device=device, dtype=tensors[0].dtype)
        for mine, theirs in zip((*self.pages.k, *self.pages.v), tensors):
            mine.copy_(theirs)
        windows = tuple(Window(tuple(slots), pinned) for slots, pinned in s["windows"])
        slots = tuple({chunk: place for place, chunk in enumerate(own)} for own in s["chunks"])
        self.standing = Standing(s["chunk"], tuple(s["shots"]), windows, slots)


class Asked(NamedTuple):
    """A network and the texts that it reads: one row per sample, or those that `prompt_B1` names. `forwards`: its forwards are recorded there.

    `levels`: what it made of noise levels in this rollout, by (level, given frames); None: it makes them every time.
    """

    dit: WanDiT
    text: TextContext
    prompt_B1: torch.Tensor | None = None
    forwards: FixedForwards | None = None
    levels: dict[tuple[float, int], NoiseLevels] | None = None


class Recorded:
    """Forwards of a network at fixed addresses, CUDA graphs on a GPU, and the pages that they write: one rollout at a time."""

    def __init__(self, dit: WanDiT, device: torch.device):
        self.forwards = FixedForwards(dit, device)
        self._pages: dict[tuple, Pages] = {}

    def pages(self, layers: int, batch: int, slots: int, *sizes: int, device: torch.device, dtype: torch.dtype) -> Pages:
        """The same pages as before, if they have slots enough. What is in them is of no use."""
        key = layers, batch, *sizes, device, dtype
        if key not in self._pages or self._pages[key].k[0].shape[1] < slots:
            self._pages[key] = Pages(layers, batch, slots, *sizes, device=device, dtype=dtype)
        return self._pages[key]


class Stepping(NamedTuple):
    """A copy of the student without gradients, the texts of a whole rollout, and where its forwards are recorded (None: they are not)."""

    dit: WanDiT
    text: TextContext
    recorded: Recorded | None = None

    def asked(self, rows_B: torch.Tensor, levels: dict[tuple[float, int], NoiseLevels]) -> Asked:
        """For one chunk; `levels` are those of the whole rollout."""
        if self.recorded is None:
            return Asked(self.dit, self.text.select(rows_B), levels=levels)
        return Asked(self.dit, self.text, rows_B[:, None], self.recorded.forwards, levels)


class _Chunk:
    """One chunk of a segment: the passes over it. `asked` answers with gradients (None where none are wanted), `free` without."""

    def __init__(
        self, rollout: StudentRollout, own: int, cut_B: list[bool], noise: torch.Tensor, known: KnownFrames | None, asked: Asked | None, free: Asked
    ):
        self.rollout, self.asked, self.free = rollout, asked, free
        settings, before = rollout.settings, rollout.standing
        policy, f = settings.policy, settings.chunk_frames
        self.chunk = chunk = before.chunk
        cuts = [cut and chunk > 0 for cut in cut_B]
        shots = tuple(s + cut for s, cut in zip(before.shots, cuts))
        opened = [policy.open(w, chunk) for w in before.windows]
        closed = [policy.close(w, chunk, cut) for w, cut in zip(opened, cuts)]
        slots = [{**s, chunk: own} for s in before.slots]
        self.closed = Standing(chunk + 1, shots, tuple(closed), tuple({c: s[c] for c in w.slots} for s, w in zip(slots, closed)))
        self.tokens = _tokens(settings, chunk, shots, noise.shape[-2:], noise.device)
        self.own_tokens = rollout.layout.shard_tokens(self.tokens, rollout.mesh.sp_rank)
        self.known = nothing_known(noise) if known is None else known.part(chunk * f, f)
        seen, after = ([[s[c] for c in w.order if c != chunk] for w, s in zip(windows, slots)] for windows in (opened, closed))
        attend = self._attend(seen, own)
        self.attends = attend, attend if after == seen else self._attend(after, own)

    def _attend(self, visible: list[list[int]], own: int) -> Attend:
        r = self.rollout
        options = {"relative": r.settings.relative, "t_scale": r.settings.t_scale}
        attend = r.wrap(RolledOut(r.pages, own, visible, self.tokens, r.dit.dims.head_dim, **options))
        return attend if r.mesh.sp_size == 1 else Ulysses(attend, r.mesh, r.layout)

    def _ask(self, asked: Asked, x_BFCHW: torch.Tensor, sigma: float, attend: Attend, until: str = "velocity") -> torch.Tensor | None:
        r, tokens = self.rollout, self.own_tokens
        x = r.layout.shard(x_BFCHW, r.mesh.sp_rank)
        with r.phase():
            told = self._told(asked, sigma, x_BFCHW)
            if asked.forwards is None:
                out = asked.dit(patchify(x), tokens, told, asked.text, attend, until)
            else:
                tokens = replace(tokens, prompt_BG=asked.prompt_B1)
                out = asked.forwards(patchify(x), tokens, told, asked.text, attend, until)
        return None if out is None else gather_frames(wide(unpatchify(out, x.shape[1], tokens.height, tokens.width)), r.mesh)

    def _told(self, asked: Asked, sigma: float, x_BFCHW: torch.Tensor) -> torch.Tensor | NoiseLevels:
        """The noise levels of this rank's frames, or what the network made of them."""
        kept, key = asked.levels, (sigma, self.known.frames)
        if kept is not None and key in kept:
            return kept[key]
        told = self.known.levels(torch.full(x_BFCHW.shape[:2], sigma, dtype=torch.float64, device=x_BFCHW.device))
        told = self.rollout.layout.shard(told, self.rollout.mesh.sp_rank)
        return told if kept is None else kept.setdefault(key, asked.dit.levels(told))

    def sample(self, noise: torch.Tensor, exits: Exits, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The chunk's clean latents at its exit step, those that are to be committed, and the noisy ones that the exit step began from."""
        schedule, attend, velocities, x = self.rollout.schedule, self.attends[0], [], self.known.clamp(noise)
        step = exits.steps[number]
        with torch.no_grad():
            for earlier in range(step):
                velocities.append(self._ask(self.free, x, schedule.model_sigma(earlier), attend))
                x = self.known.clamp(combine(noise, velocities, schedule.rows[earlier]))
        wanted = torch.is_grad_enabled() and number >= exits.first_with_gradients
        with torch.set_grad_enabled(wanted):
            velocity = self._ask(self.asked if wanted else self.free, x, schedule.model_sigma(step), attend)
            level = (exits.levels or schedule.sigmas)[step]
            clean, at_exit = self.known.clamp(x - level * velocity), x
        if not exits.finish or step + 1 == schedule.steps:
            return clean, clean.detach(), at_exit
        with torch.no_grad():
            velocities.append(velocity.detach())
            for later in range(step + 1, schedule.steps):
                x = self.known.clamp(combine(noise, velocities, schedule.rows[later - 1]))
                velocities.append(self._ask(self.free, x, schedule.model_sigma(later), attend))
            return clean, self.known.clamp(combine(noise, velocities, schedule.rows[-1])), at_exit

    @torch.no_grad()
    def commit(self, clean_BFCHW: torch.Tensor, level: float) -> None:
        self._ask(self.free, clean_BFCHW, level, self.attends[1], "kv")


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _tokens(settings: RolloutSettings, chunk: int, shots: tuple[int, ...], size: tuple[int, int], device: torch.device) -> Tokens:
    f = settings.chunk_frames
    frame = chunk * f + torch.arange(f, dtype=torch.float64)
    position = (torch.tensor(shots, dtype=torch.float64)[:, None] * settings.shot_offset + frame).to(device, non_blocking=True)
    prompt = torch.arange(len(shots))[:, None].to(device, non_blocking=True)
    return Tokens(position, torch.full((f,), chunk), torch.ones(f, dtype=torch.bool), prompt, size[0] // 2, size[1] // 2)
