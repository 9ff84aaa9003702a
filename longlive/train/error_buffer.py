"""Errors that the model made, kept by noise level so that later steps can show them to it again (spec training §4).

A bucket is a slice of the 1000 entries of the training table, one for all chunks or one for each chunk position. Every draw (which entry, how strong,
which one to overwrite) comes from a `random.Random` that the caller seeds. Ranks that share a sample share one buffer: bucket b is stored on rank
b mod `ranks`, and how full every bucket is is known to all of them, so that all draw the same entries as a single rank would.

Legend: n entries, ... the shape of one entry (latent frames of a chunk, channels, rows, columns).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..core.errors import CheckpointError, ConfigError
from ..diffusion.flow import TRAIN_STEPS

STRATEGIES = ("random", "fifo", "l2")


class Pick(NamedTuple):
    """A drawn entry: bucket (position, slice), its place there (oldest first under fifo), and the factor to multiply it by."""

    key: tuple[int, int]
    place: int
    factor: float


@dataclass(frozen=True, kw_only=True)
class BufferSizes:
    """Sizes of one buffer. `positions` 0: chunks are not told apart. `rank` of `ranks` stores its share of the buckets."""

    buckets: int
    capacity: int
    entry: tuple[int, ...]
    positions: int = 0
    rank: int = 0
    ranks: int = 1

    @property
    def keys(self) -> list[tuple[int, int]]:
        """All buckets, in the order in which entries count."""
        return list(itertools.product(range(max(1, self.positions)), range(self.buckets)))

    @property
    def own_keys(self) -> list[tuple[int, int]]:
        return [key for key in self.keys if key[1] % self.ranks == self.rank]

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's entries in bfloat16 when every bucket is full."""
        return 2 * math.prod(self.entry) * self.capacity * len(self.own_keys)


class ErrorBuffer:
    """Entries in `dtype` on `device`, at most `sizes.capacity` in each bucket; `sizes.nbytes` of address space are reserved at once.

    On a CPU the system backs them with memory only as they are written. Raises ConfigError where they cannot be had.
    """

    def __init__(
        self, sizes: BufferSizes, *, modulate: float, replacement: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
    ):
        if replacement not in STRATEGIES:
            raise ConfigError(f"replacement_strategy {replacement!r} is none of {', '.join(STRATEGIES)}")
        self.sizes, self.modulate, self.replacement = sizes, modulate, replacement
        self.counts = dict.fromkeys(sizes.keys, 0)
        self.added = 0
        self._rows: dict[tuple[int, int], list[int]] = {key: [] for key in sizes.own_keys}
        self._used = 0
        try:
            self._pool = torch.empty(sizes.capacity * len(self._rows), *sizes.entry, dtype=dtype, device=device)
        except RuntimeError as error:
            need = f"{sizes.nbytes / 1e9:.1f} GB on {device} for training.error_recycling cannot be had"
            raise ConfigError(f"{need} ({str(error).splitlines()[0]}); lower training.error_recycling.max_size_per_bucket({sizes.capacity})") from None

    def __len__(self) -> int:
        """Entries in all buckets, on all ranks."""
        return sum(self.counts.values())

    @property
    def device(self) -> torch.device:
        """Where the entries are."""
        return self._pool.device

    def key(self, index: int, position: int = 0) -> tuple[int, int]:
        """The bucket of a table index; positions beyond the last one count as the last."""
        last = max(1, self.sizes.positions) - 1
        return min(position, last), index * self.sizes.buckets // TRAIN_STEPS

    def holds(self, key: tuple[int, int]) -> bool:
        """Whether the entries of this bucket are stored on this rank."""
        return key in self._rows

    def add(self, error: torch.Tensor | None, index: int, rng: random.Random, position: int = 0) -> None:
        """Takes one entry. `error` is read only where the bucket is stored (None is right elsewhere). Draws only when a bucket overwrites at random."""
        key, capacity = self.key(index, position), self.sizes.capacity
        full = self.counts[key] == capacity
        place = rng.randrange(capacity) if full and self.replacement == "random" else 0
        self.counts[key] += not full
        self.added += 1
        if key not in self._rows:
            return
        rows, value = self._rows[key], error.to(self._pool)
        if not full:
            rows.append(self._used)
            self._used, place = self._used + 1, -1
        elif self.replacement == "fifo":
            rows.append(rows.pop(0))
            place = -1
        elif self.replacement == "l2":
            place = int((self._pool[rows].float() - value.float()).flatten(1).square().sum(1).argmin())
        self._pool[rows[place]] = value

    def pick(self, index: int, rng: random.Random, position: int = 0) -> Pick | None:
        """A random entry of the bucket; None (and no draw) from an empty one."""
        return self._pick([self.key(index, position)], rng)

    def pick_any(self, rng: random.Random, position: int | None = None) -> Pick | None:
        """A random entry of any noise level, of `position` where positions are told apart and it is given."""
        keys = self.sizes.keys
        if position is not None and self.sizes.positions:
            keys = [key for key in keys if key[0] == min(position, self.sizes.positions - 1)]
        return self._pick(keys, rng)

    def _pick(self, keys: Sequence[tuple[int, int]], rng: random.Random) -> Pick | None:
        total = sum(self.counts[key] for key in keys)
        if not total:
            return None
        place, at = rng.randrange(total), 0
        while place >= self.counts[keys[at]]:
            place -= self.counts[keys[at]]
            at += 1
        factor = rng.uniform(1 - self.modulate, 1 + self.modulate) if self.modulate > 0 else 1.0
        return Pick(keys[at], place, factor)

    def values(self, picks: Sequence[Pick | None], device: torch.device | str = "cpu") -> torch.Tensor:
        """float32 [n, ...]: the picked entries times their factors; zero for None and for what another rank stores."""
        out = torch.zeros(len(picks), *self.sizes.entry, device=device)
        held = [(n, self._rows[pick.key][pick.place], pick.factor) for n, pick in enumerate(picks) if pick is not None and pick.key in self._rows]
        if held:
            places, rows, factors = zip(*held)
            entries = self._pool[torch.tensor(rows, device=self._pool.device)].to(device).float()
            out[torch.tensor(places, device=device)] = entries * torch.tensor(factors, device=device).reshape(-1, *[1] * len(self.sizes.entry))
        return out

    def state_dict(self) -> dict:
        """Everything, as tensors and numbers: counts of all buckets, and this rank's entries bucket by bucket."""
        rows = [row for key in self.sizes.own_keys for row in self._rows[key]]
        return {
            "layout": {"buckets": self.sizes.buckets, "capacity": self.sizes.capacity, "positions": self.sizes.positions, "entry": list(self.sizes.entry)},
            "rank": self.sizes.rank,
            "ranks": self.sizes.ranks,
            "added": self.added,
            "counts": torch.tensor(list(self.counts.values())),
            "entries": self._pool[torch.tensor(rows, dtype=torch.int64, device=self._pool.device)].cpu(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores exactly what `state_dict` gave on this rank, or this rank's share of what `merged` gave. Raises CheckpointError for other sizes."""
        ours = BufferSizes(**vars(self.sizes) | {"rank": state["rank"], "ranks": state["ranks"]})
        layout = dict(buckets=ours.buckets, capacity=ours.capacity, positions=ours.positions, entry=list(ours.entry))
        if different := [f"{name} {state['layout'][name]} there, {layout[name]} here" for name in layout if state["layout"][name] != layout[name]]:
            raise CheckpointError(f"the saved error buffer has {'; '.join(different)}; set training.error_recycling as it was, or use --no-auto-resume")
        if state["ranks"] != 1 and (state["rank"], state["ranks"]) != (self.sizes.rank, self.sizes.ranks):
            share = f"share {state['rank']} of {state['ranks']} of an error buffer is not share {self.sizes.rank} of {self.sizes.ranks}"
            raise CheckpointError(f"{share}; merge all shares first, or resume with infra.sequence_parallel_size={state['ranks']}")
        self.counts = dict(zip(self.sizes.keys, state["counts"].tolist()))
        self.added, self._used, at = state["added"], 0, 0
        for key in ours.own_keys:
            count = self.counts[key]
            if key in self._rows:
                self._rows[key] = list(range(self._used, self._used + count))
                self._pool[self._used : self._used + count] = state["entries"][at : at + count].to(self._pool)
                self._used += count
            at += count


def merged(states: Sequence[dict]) -> dict:
    """One state from those of all ranks that share a buffer, in any order; ranks of any other number can load it. Raises CheckpointError where one misses."""
    states = sorted(states, key=lambda state: state["rank"])
    ranks = states[0]["ranks"]
    if [state["rank"] for state in states] != list(range(ranks)):
        raise CheckpointError(f"an error buffer in {ranks} shares, of which {[state['rank'] for state in states]} are here; all of them are needed")
    layout = states[0]["layout"]
    sizes = BufferSizes(**layout | {"entry": tuple(layout["entry"])})
    counts = dict(zip(sizes.keys, states[0]["counts"].tolist()))
    at, parts = [0] * ranks, []
    for key, count in counts.items():
        owner = key[1] % ranks
        parts.append(states[owner]["entries"][at[owner] : at[owner] + count])
        at[owner] += count
    return {**states[0], "rank": 0, "ranks": 1, "entries": torch.cat(parts)}
