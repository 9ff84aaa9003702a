"""The recorded life of an error buffer: entries added and drawn, in order.

The published buffer of a rank among several drops what belongs to the buckets of others and looks in its nearest own bucket instead. Ours is one buffer
whose buckets lie on several ranks, and draws what a single rank would draw; the recorded rule is put in front of it here.
"""

from __future__ import annotations

import random

import torch

from ...core.errors import InputError
from ...diffusion.flow import TRAIN_STEPS
from ...train.error_buffer import BufferSizes, ErrorBuffer


class _Recorded:
    """The buffer of one recorded case. Its buckets are the shard's own ones, renumbered, so that nothing else exists in it."""

    def __init__(self, given: dict):
        k = given["kwargs"]
        self.rank, self.ranks, self.buckets = k.get("shard_rank", 0), k.get("shard_size", 1), k["num_buckets"]
        self.own = list(range(self.rank, self.buckets, self.ranks))
        self.positions, self.offset = k.get("num_blocks", 0), k.get("global_block_offset", 0)
        sizes = BufferSizes(buckets=len(self.own), capacity=k["max_size_per_bucket"], entry=(4,), positions=self.positions)
        self.buffer = ErrorBuffer(sizes, modulate=k["modulate_factor"], replacement=k["replacement_strategy"], dtype=torch.float32)
        self.rng = random.Random(given["py_random_seed"])

    def index(self, t: int, *, nearest: bool) -> int | None:
        """An index that falls into the shard's bucket for timestep index `t`: its own, or the nearest own one (the later of two). None: foreign."""
        bucket = t * self.buckets // TRAIN_STEPS
        if bucket not in self.own and not nearest:
            return None
        number = min(range(len(self.own)), key=lambda n: (abs(self.own[n] - bucket), -n))
        return -(-number * TRAIN_STEPS // len(self.own))

    def event(self, event: dict) -> list[float] | None:
        buffer, position = self.buffer, event["pos"] or 0
        if event["op"] == "add":
            index = self.index(event["t"], nearest=False)
            if index is not None:
                buffer.add(torch.tensor(event["value"]), index, self.rng, position)
            return None
        picks = {
            "sample": lambda: buffer.pick(self.index(event["t"], nearest=True), self.rng, position),
            "sample_pos_any_t": lambda: buffer.pick_any(self.rng, position),
            "sample_global": lambda: buffer.pick_any(self.rng),
        }
        if event["op"] not in picks:
            raise InputError(f"event {event['op']!r} is none of add, {', '.join(picks)}")
        pick = picks[event["op"]]()
        return None if pick is None else buffer.values([pick])[0].tolist()

    def contents(self) -> dict[str, list[list[float]]]:
        entries, found, at = self.buffer.state_dict()["entries"], {}, 0
        for (position, number), count in self.buffer.counts.items():
            name = str((position, self.own[number])) if self.positions else str(self.own[number])
            found[name], at = entries[at : at + count].tolist(), at + count
        return found

    def statistics(self) -> dict:
        counts = list(self.buffer.counts.values())
        found = {"total_added": self.buffer.added, "filled_buckets": f"{sum(c > 0 for c in counts)}/{len(counts)}", "total_entries": len(self.buffer)}
        if self.ranks > 1:
            found["shard"] = f"shard_rank={self.rank}/{self.ranks} ({len(self.own)}/{self.buckets} t-buckets)"
        if self.positions:
            found["global_block_range"] = f"[{self.offset},{self.offset + self.positions})"
        return found


def run_case(name: str, given: dict) -> dict:
    """`given`: kwargs of the recorded buffer, py_random_seed, events. The samples drawn, what the buckets hold at the end, and statistics."""
    recorded = _Recorded(given)
    samples = [drawn for event in given["events"] if (drawn := recorded.event(event)) is not None or event["op"] != "add"]
    return {"samples": samples, "buckets": recorded.contents(), "stats": recorded.statistics()}
