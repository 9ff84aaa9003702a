"""Attention strategies: what a layer's queries read, decided outside the transformer.

Every strategy receives normalised, unrotated q, k, v of all tokens and owns the rotation. `Full`: everything sees everything.
`TeacherForced`: the training sequence, as dense unmasked calls per chunk. `Cached`: one chunk of a rollout against stored pages.
Training and rollout read the same keys at the same positions, so that they agree to rounding.

Legend: B batch, N queries, M keys, H heads, d head features, F frames, C chunks, P visible chunks, L tokens of a chunk,
K noisy copies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..core.errors import InputError
from ..core.tokens import Tokens
from ..ops.attention import attention
from ..ops.coded_attention import coded_attention, norm_rope_code
from ..ops.heads import Heads, norm_rope_write, norm_rotate
from ..ops.merged_attention import Read, film_attention, part_kernel
from ..ops.rope import apply_rope, rope_tables
from .coded import CodedPages
from .pages import Pages
from .policy import Window, WindowPolicy, visible_chunks
from .quantised import QuantisedPages

Tables = tuple[torch.Tensor, torch.Tensor]
PLAIN = "plain"
STORES = (Pages, QuantisedPages, CodedPages)  # their slots stay where they are


class Full:
    """Every token sees every token: the bidirectional model, or a sequence of one chunk."""

    def __init__(self, tokens: Tokens, head_dim: int, *, t_scale: float = 1.0):
        self.rope = rope_tables(tokens, head_dim, t_scale=t_scale)

    def __call__(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None:
        return None if q is None else attention(apply_rope(q, *self.rope), apply_rope(k, *self.rope), v)


@dataclass(frozen=True)
class ChunkRead:
    """What the tokens [start, stop) of G neighbouring chunks read besides their own chunk.

    rows     int64 [B * G * m], rows of the clean chunks viewed as [B * C, L, ...], m a chunk; None: all clean tokens before `start`, G = 1
    bias     bool [B, G, 1, 1, M], False on keys of absent chunks; None: all are there
    keys, queries   rotation tables [B or 1, G, ...] of [read chunks, own] and of own in relative mode, else None
    """

    start: int
    stop: int
    chunks: int = 1
    rows: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    keys: Tables | None = None
    queries: Tables | None = None


class TeacherForced:
    """The training sequence [clean film; noisy copy; noisy copy; ...] with any number K >= 0 of noisy copies.

    A clean chunk sees clean chunks up to itself; a noisy chunk sees the clean chunks before it and itself (spec training §3.2).
    `visible_BCP` int64 (-1 = none; order is free in absolute mode, oldest first in relative mode; the own chunk is ignored) narrows
    "before it" to the pages that a rollout would have (`visible_tensor`); `committed_BCP` does so for the clean copy
    where a recache makes the two differ. `relative`: positions count from the oldest visible chunk, as in relative rollouts.
    The layout (`chunk_F`, `noisy_F`, `visible_BCP`) is read on the host, once, here: best kept on the CPU.
    Within a window, neighbouring chunks that read equally many others share one attention call, the clean copy among the others.
    Over the whole history, `kernel` is an entry of `ops.merged_attention.PART_KERNELS`, "plain" (a call per copy and chunk, keys joined by copying), or
    "auto": the one that pays on the device and dtype of the queries, else plain. Relative positions and unequal chunks are always plain.
    `keep_reads`: for blocks whose activations are recomputed. In the first so many layers the second call is taken as the recomputation of the first and
    reuses what it read, where a kernel of `ops.merged_attention` read it; one strategy then serves one forward and backward.
    """

    def __init__(
        self,
        tokens: Tokens,
        head_dim: int,
        visible_BCP: torch.Tensor | None = None,
        *,
        committed_BCP: torch.Tensor | None = None,
        t_scale: float = 1.0,
        relative: bool = False,
        kernel: str = "auto",
    ):
        self.frames = film_frames(tokens)
        self.noisy_copies = tokens.frames // len(self.frames) - 1
        self.rope = None if relative else rope_tables(tokens, head_dim, t_scale=t_scale)
        bounds = _bounds(self.frames, tokens.frame_tokens)
        plan = _Plan(tokens, head_dim, t_scale, relative, bounds, tokens.position_BF.device)
        self.noisy = plan.reads(visible_BCP)
        self.clean = self.noisy if committed_BCP is None else plan.reads(committed_BCP)
        self.chunks = len(bounds)
        self.alike = visible_BCP is not None and committed_BCP is None
        whole = visible_BCP is None and committed_BCP is None and not relative and len({b - a for a, b in bounds}) == 1
        self.kernel = kernel if whole else PLAIN
        self.keep_reads = 0
        self._reads: dict[int, Read] = {}

    def __call__(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None:
        if q is None:
            return None
        if self.rope is not None:
            q, k = apply_rope(q, *self.rope), apply_rope(k, *self.rope)
        kernel = part_kernel(q) or PLAIN if self.kernel == "auto" else self.kernel
        if kernel != PLAIN:
            return self._whole_history(q, k, v, layer, kernel)
        split = q.shape[1] // (self.noisy_copies + 1)
        past = (k[:, :split], v[:, :split])
        if self.alike:
            return self._copies(self.noisy, (q, k, v), past, self.noisy_copies + 1, clean=False)
        out = [self._copies(self.clean, (q[:, :split], *past), past, 1, clean=True)]
        if self.noisy_copies:
            out.append(self._copies(self.noisy, (q[:, split:], k[:, split:], v[:, split:]), past, self.noisy_copies, clean=False))
        return torch.cat(out, dim=1)

    def _whole_history(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, kernel: str) -> torch.Tensor:
        keep = layer < self.keep_reads and torch.is_grad_enabled()
        earlier = self._reads.pop(layer, None) if keep else None
        out, read = film_attention(q, k, v, streams=self.noisy_copies + 1, chunks=self.chunks, kernel=kernel, read=earlier)
        if keep and earlier is None:
            self._reads[layer] = read
        return out

    def _copies(
        self, reads: list[ChunkRead], qkv: tuple[torch.Tensor, ...], past: tuple[torch.Tensor, ...], copies: int, *, clean: bool
    ) -> torch.Tensor:
        """Attention of `copies` copies of the film, each over the clean `past` and itself; copies and chunks lie side by side in the batch."""
        q, k, v = (t.unflatten(1, (copies, -1)) for t in qkv)
        out = []
        for read in reads:
            own = [t[:, :, read.start : read.stop].unflatten(2, (read.chunks, -1)) for t in (q, k, v)]
            if clean and read.rows is None:
                keys, values = (t[:, : read.stop] for t in past)
            else:
                keys, values = (self._join(read, t, o) for t, o in zip(past, own[1:]))
            queries, bias = own[0].flatten(0, 2), read.bias
            if read.keys is not None:
                queries, keys = _rotate(queries, read.queries, copies), _rotate(keys, read.keys, copies)
            if bias is not None:
                bias = _beside(bias, copies)
            out.append(attention(queries, keys, values, bias).unflatten(0, (-1, copies, read.chunks)).flatten(2, 3))
        return torch.cat(out, dim=2).flatten(1, 2)

    def _join(self, read: ChunkRead, past_BNHd: torch.Tensor, own_BKGLHd: torch.Tensor) -> torch.Tensor:
        """[B * K * G, M + L, H, d]: the chunks that are read, then the copy's own."""
        batch, copies = own_BKGLHd.shape[:2]
        if read.rows is None:
            chosen = past_BNHd[:, None, : read.start]
        else:
            chunks = past_BNHd.unflatten(1, (self.chunks, -1)).flatten(0, 1)
            chosen = chunks.index_select(0, read.rows).reshape(batch, read.chunks, -1, *chunks.shape[2:])
        return torch.cat((chosen.unsqueeze(1).expand(-1, copies, -1, -1, -1, -1), own_BKGLHd), dim=3).flatten(0, 2)


def visible_tensor(cuts_B: list[list[bool]], policy: WindowPolicy, *, commit: bool = False) -> torch.Tensor:
    """`visible_chunks` of a batch for `TeacherForced`: int64 [B, C, P], oldest first, without the own chunk, padded with -1 at the end."""
    rows = [[v[:-1] for v in visible_chunks(cuts, policy, commit=commit)] for cuts in cuts_B]
    width = max(1, policy.pages - 1)
    return torch.tensor([[(*v, *[-1] * (width - len(v))) for v in row] for row in rows], dtype=torch.int64)


def film_frames(tokens: Tokens) -> list[int]:
    """Chunk of each frame of the clean film at the head of a training sequence. Raises InputError for any other layout."""
    chunk, noisy = tokens.chunk_F.tolist(), tokens.noisy_F.tolist()
    restart = next((i for i in range(1, len(chunk)) if chunk[i] < chunk[i - 1] or noisy[i] != noisy[i - 1]), len(chunk))
    copies = len(chunk) // restart
    if chunk != chunk[:restart] * copies or noisy != [i >= restart for i in range(len(chunk))]:
        raise InputError(f"a training sequence is [clean film; noisy copy; ...] with the same chunks in each copy; got chunks {chunk}, noisy {noisy}")
    return chunk[:restart]


def _bounds(chunk_F: list[int], frame_tokens: int) -> list[tuple[int, int]]:
    """Token range [start, stop) of every chunk."""
    starts = [i for i in range(len(chunk_F)) if i == 0 or chunk_F[i] != chunk_F[i - 1]] + [len(chunk_F)]
    return [(a * frame_tokens, b * frame_tokens) for a, b in zip(starts, starts[1:])]


def _beside(t_BG: torch.Tensor, copies: int) -> torch.Tensor:
    """[B, G, ...] -> [B * K * G, ...], the same for every copy."""
    return t_BG.unsqueeze(1).expand(-1, copies, *t_BG.shape[1:]).flatten(0, 2)


def _rotate(x: torch.Tensor, tables: Tables, copies: int) -> torch.Tensor:
    """apply_rope with tables [B or 1, G, ...] for copies and chunks that lie side by side in the batch."""
    samples = x.shape[0] // (copies * tables[0].shape[1])
    cos, sin = (_beside(t.expand(samples, *t.shape[1:]), copies) for t in tables)
    return apply_rope(x, cos, sin)


@dataclass(frozen=True)
class _Plan:
    """Turns visibility into ChunkReads."""

    tokens: Tokens
    head_dim: int
    t_scale: float
    relative: bool
    bounds: list[tuple[int, int]]
    device: torch.device

    def reads(self, visible_BCP: torch.Tensor | None) -> list[ChunkRead]:
        if visible_BCP is None:
            return [self._everything(start, stop) for start, stop in self.bounds]
        if len({stop - start for start, stop in self.bounds}) > 1:
            raise InputError(f"a window of chunks needs chunks of one size; got token ranges {self.bounds}")
        lists = [[[c for c in row if c >= 0] for row in sample] for sample in visible_BCP.tolist()]
        others = [[[c for c in sample[i] if c != i] for sample in lists] for i in range(len(self.bounds))]
        counts = [max(map(len, visible)) for visible in others]
        starts = [i for i in range(len(counts)) if i == 0 or counts[i] != counts[i - 1]] + [len(counts)]
        return [self._chosen(first, others[first:after]) for first, after in zip(starts, starts[1:])]

    def _everything(self, start: int, stop: int) -> ChunkRead:
        read = ChunkRead(start, stop)
        if not self.relative:
            return read
        tables = self._tables(torch.arange(stop // self.tokens.frame_tokens)[None, None])
        return replace(read, keys=tables, queries=tuple(t[:, :, start:] for t in tables))

    def _chosen(self, first: int, visible_GB: list[list[list[int]]]) -> ChunkRead:
        """`visible_GB[g][b]`: the earlier chunks that chunk `first + g` of sample b reads; all chunks of a group read equally many."""
        group = len(visible_GB)
        start, stop = self.bounds[first][0], self.bounds[first + group - 1][1]
        size, count = (stop - start) // group, max(len(v) for visible in visible_GB for v in visible)
        visible_BG = list(zip(*visible_GB))
        padded = torch.tensor([[v + [-1] * (count - len(v)) for v in sample] for sample in visible_BG], dtype=torch.int64)
        padded = padded.reshape(len(visible_BG), group, count)
        rows = padded.clamp(min=0) + len(self.bounds) * torch.arange(len(padded))[:, None, None]
        read = ChunkRead(start, stop, group, rows.flatten().to(self.device, non_blocking=True))
        if (padded < 0).any():
            there = torch.cat((padded >= 0, torch.ones_like(padded[:, :, :1], dtype=torch.bool)), dim=2)
            read = replace(read, bias=there.repeat_interleave(size, 2)[:, :, None, None].to(self.device, non_blocking=True))
        if self.relative:
            ranks = torch.tensor([[[*range(count), len(v)] for v in sample] for sample in visible_BG])
            frames = size // self.tokens.frame_tokens
            tables = self._tables((ranks[..., None] * frames + torch.arange(frames)).flatten(2))
            read = replace(read, keys=tables, queries=tuple(t[:, :, -size:] for t in tables))
        return read

    def _tables(self, position_BGF: torch.Tensor) -> Tables:
        """Rotation tables [B, G, F * frame tokens, d/2]."""
        position_BF = position_BGF.flatten(0, 1).to(self.device, torch.float64, non_blocking=True)
        tables = rope_tables(self.tokens, self.head_dim, t_scale=self.t_scale, position_BF=position_BF)
        return tuple(t.unflatten(0, position_BGF.shape[:2]) for t in tables)


class Cached:
    """One chunk of a rollout: its keys and values go to their slot, its queries read all filled slots.

    With gradients off the slots are written in place, so that every step and the commit overwrite the chunk's own slot, and reading
    is a view. With gradients on nothing is written: the other slots are copied once, constant and safe from later steps, and the own
    keys and values stay in the graph; recomputation reads the same copies.
    Absolute mode stores rotated keys, unless the store keeps them unrotated. `relative` stores them unrotated and rotates the window at positions
    0, 1, ... oldest first. `commit`: the chunk is finished, and what is written now is what later chunks read. `kernel`: an entry of
    `ops.attention.KERNELS` for reading where all slots are there and gradients are off.
    """

    places = ("slot_B", "there_BP", "rope", "slot_rope")

    def __init__(
        self,
        pages: Pages | QuantisedPages | CodedPages,
        windows: list[Window],
        chunk: int,
        tokens: Tokens,
        head_dim: int,
        *,
        relative: bool = False,
        t_scale: float = 1.0,
        commit: bool = False,
        kernel: str = "auto",
    ):
        device = tokens.position_BF.device
        own = [w.slot(chunk) for w in windows]
        counts = [len(w.slots) for w in windows]
        self.pages, self.filled, self.kernel = pages, max(counts), kernel
        self.slot_B = torch.tensor(own).to(device, non_blocking=True)  # here and below: the host does not wait for the queue of the device
        others = [[s for s in range(self.filled) if s != o] for o in own]
        self.others_BP = torch.tensor(others, dtype=torch.int64).reshape(len(own), self.filled - 1).to(device, non_blocking=True)
        self.there_BP = None
        if min(counts) < self.filled:
            self.there_BP = torch.tensor([[s < n for s in range(self.filled)] for n in counts]).to(device, non_blocking=True)
        self.slot_rope: Tables | None = None
        pages.begin(windows, chunk, tokens, self.slot_B, commit)
        if relative:
            place = [[w.order.index(c) for c in w.slots] + [0] * (self.filled - len(w.slots)) for w in windows]
            frames = torch.arange(tokens.frames)
            slot_position = (torch.tensor(place)[:, :, None] * tokens.frames + frames).flatten(1).to(device, torch.float64, non_blocking=True)
            self.slot_rope = rope_tables(tokens, head_dim, t_scale=t_scale, position_BF=slot_position)
            own_position = (torch.tensor(counts)[:, None] - 1) * tokens.frames + frames
            self.rope = rope_tables(tokens, head_dim, t_scale=t_scale, position_BF=own_position.to(device, torch.float64, non_blocking=True))
        else:
            self.rope = rope_tables(tokens, head_dim, t_scale=t_scale)
            if pages.unrotated:
                self.slot_rope = rope_tables(tokens, head_dim, t_scale=t_scale, position_BF=pages.positions(self.filled))
        self._frozen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def variant(self) -> tuple:
        """What decides which kernels run, beside the shapes of `places`: equal for chunks that one recording serves."""
        return self.filled, self.there_BP is None, self.slot_rope is None

    def __call__(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None:
        if self.slot_rope is None:
            k = apply_rope(k, *self.rope)
        if torch.is_grad_enabled():
            return None if q is None else self._read_with_gradients(q, k, v, layer)
        self.pages.write(layer, self.slot_B, k, v)
        return None if q is None else self._read(apply_rope(q, *self.rope), layer)

    def takes(self, heads: Heads) -> bool:
        """Bare projections are taken where slots are written in place: norm, rotation and (but for a quantised store) the way into the slot are one pass."""
        return type(self.pages) in STORES and not torch.is_grad_enabled()

    def attend(self, heads: Heads, layer: int) -> torch.Tensor | None:
        """As a call with the normalised heads."""
        if isinstance(self.pages, QuantisedPages):
            q, k, v = norm_rotate(heads, self.rope)
            self.pages.write(layer, self.slot_B, k, v)
            return None if q is None else self._read(q, layer)
        pages = self.pages.k[layer], self.pages.v[layer]
        if isinstance(self.pages, CodedPages):
            q = norm_rope_code(heads, self.rope, self.slot_B, *pages)
        else:
            q = norm_rope_write(heads, self.rope, self.slot_B, *pages, rotate_k=self.slot_rope is None)
        return None if q is None else self._read(q, layer)

    def _read(self, q: torch.Tensor, layer: int) -> torch.Tensor:
        """What rotated queries read from the filled slots."""
        if isinstance(self.pages, CodedPages) and self.there_BP is None:
            return coded_attention(q, *self.pages.codes(layer, self.filled))
        keys, values = self.pages.read(layer, self.filled, self.slot_rope)
        kernel = self.kernel if self.there_BP is None else "auto"
        return attention(q, keys, values, self._bias(self.there_BP, q.shape[1]), kernel=kernel)

    def _read_with_gradients(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        if layer not in self._frozen:
            self._frozen[layer] = self._freeze(layer)
        if self.slot_rope is not None:
            k = apply_rope(k, *self.rope)
        keys, values = (torch.cat((past, own), dim=1) for past, own in zip(self._frozen[layer], (k, v)))
        there = None
        if self.there_BP is not None:
            there = torch.cat((self.there_BP.gather(1, self.others_BP), torch.ones_like(self.there_BP[:, :1])), dim=1)
        return attention(apply_rope(q, *self.rope), keys, values, self._bias(there, q.shape[1]))

    @torch.no_grad()
    def _freeze(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the other slots, keys rotated."""
        keys, values = self.pages.copy_out(layer, self.others_BP)
        if self.slot_rope is not None and self.filled > 1:
            rows = torch.arange(len(self.others_BP), device=keys.device)[:, None]
            tables = (t.unflatten(1, (self.filled, -1))[rows, self.others_BP].flatten(1, 2) for t in self.slot_rope)
            keys = apply_rope(keys, *tables)
        return keys, values

    def _bias(self, there_BP: torch.Tensor | None, page_tokens: int) -> torch.Tensor | None:
        return None if there_BP is None else there_BP.repeat_interleave(page_tokens, 1)[:, None, None]
