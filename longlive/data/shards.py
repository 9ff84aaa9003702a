"""Streams that were encoded once: OUT/index.json, OUT/latents-00000.safetensors, ..., OUT/text-00000.safetensors, ...

A latent of the causal VAE depends on every earlier frame of its stream, so that a segment has no latents of its own: what can be computed beforehand is a
whole stream (folder, start, cuts), exactly as a sample shows it. `longlive encode` therefore encodes the streams of the first `passes` passes over the
data, and the index keeps what is needed to plan them again: the clips, the sampling rules and the seed.

The rule of reading. Sample g has the folder that the video path gives it. Where its stream was encoded, that is the sample: latents, prompts and cuts equal
those of the video path. Where it was not (a later pass, another seed), it is one of the encoded streams of that folder, drawn by (seed, g).

Legend: F latent frames, C latent channels, H W latent rows and columns, n tokens of a prompt, D text width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.log import logger
from .manifest import ManifestClip, ManifestSample
from .samples import Broken, VideoSample
from .sampling import SamplingRules, Segment, below, start_generator
from .sources import Fetched, Planner, Stream

INDEX = "index.json"
FORMAT = "longlive-shards"
VERSION = 1


def prompt_key(prompt: str) -> str:
    """The name of a prompt's embedding in a text shard."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """All that stands in index.json. `streams`: key -> (file, folder, segments); `broken`: key of a stream -> (clip, reason) that prevented it.

    `codec` and `text` identify what encoded them (weights and precision); `text` is None without text shards.
    """

    rules: SamplingRules
    seed: int
    passes: int
    height: int
    width: int
    codec: Mapping[str, str]
    text: Mapping[str, Any] | None
    data: str
    samples: tuple[ManifestSample, ...]
    streams: Mapping[str, tuple[str, str, tuple[Segment, ...]]]
    broken: Mapping[str, tuple[str, str]]
    prompts: Mapping[str, str]

    def to_json(self) -> str:
        streams = {key: [file, name, [[s.clip, s.start, s.count, s.cut] for s in segments]] for key, (file, name, segments) in self.streams.items()}
        values = {name: value for name, value in vars(self).items() if name not in ("rules", "samples", "streams")}
        samples = [[sample.name, [asdict(clip) for clip in sample.clips]] for sample in self.samples]
        return json.dumps({"format": FORMAT, "version": VERSION, **values, "rules": asdict(self.rules), "samples": samples, "streams": streams}) + "\n"


def read_index(root: str | Path) -> ShardIndex:
    """The index of the shards in `root`. Raises InputError where there is none or it is of another kind."""
    path = Path(root) / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT or values.pop("version") != VERSION:
            raise KeyError("format")
        samples = tuple(ManifestSample(name, tuple(ManifestClip(**clip) for clip in clips)) for name, clips in values.pop("samples"))
        streams = {key: (file, name, tuple(Segment(*s) for s in segments)) for key, (file, name, segments) in values.pop("streams").items()}
        broken = {key: (file, reason) for key, (file, reason) in values.pop("broken").items()}
        return ShardIndex(rules=SamplingRules(**values.pop("rules")), samples=samples, streams=streams, broken=broken, **values)
    except FileNotFoundError:
        raise InputError(f"{root} holds no {INDEX}; write shards there with `longlive encode ROOT {root} --config CONFIG`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not an index of shards of this version ({type(error).__name__}: {error}); run `longlive encode` again") from None


def check_index(root: str | Path, index: ShardIndex, *, rules: SamplingRules, height: int, width: int, codec: str | None = None) -> None:
    """Raises InputError unless the shards hold what this training asks for: sampling rules, size, and (where given) the weights of the VAE."""
    ours, theirs = asdict(rules), asdict(index.rules)
    ours.update(height=height, width=width, codec=codec or index.codec["weights"])
    theirs.update(height=index.height, width=index.width, codec=index.codec["weights"])
    different = [f"{name} is {theirs[name]!r} there and {ours[name]!r} here" for name in ours if ours[name] != theirs[name]]
    if different:
        raise InputError(f"the shards in {root} were written for other settings ({'; '.join(different)}); set them alike, or run `longlive encode` again")


class _Files:
    """Opened safetensors files, each opened once in a process when it is first read; copies to other processes start with none."""

    def __init__(self, root: Path):
        self.root, self._open = root, {}

    def __getstate__(self) -> dict:
        return {"root": self.root, "_open": {}}

    def tensor(self, file: str, key: str) -> Tensor:
        """A copy of one tensor. Raises InputError where the file lacks it."""
        from safetensors import SafetensorError, safe_open

        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.root / file), framework="pt")
            return self._open[file].get_tensor(key).clone()
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.root / file} cannot be read ({error}); run `longlive encode` again, it writes only what is missing") from None


class ShardSource:
    """Samples from shards, in place of `VideoSource`. `seed` None: the one that the shards were written with."""

    def __init__(self, root: str | Path, *, seed: int | None = None, max_broken: int = 0):
        self.index = read_index(root)
        self.max_broken = max_broken
        self.unreadable: tuple[Broken, ...] = ()
        self.planner = Planner(self.index.samples, self.index.rules, self.index.seed if seed is None else seed)
        self._files = _Files(Path(root))
        self._of_folder: dict[str, list[Stream]] = {}
        samples = {sample.name: sample for sample in self.index.samples}
        for _, name, segments in self.index.streams.values():
            self._of_folder.setdefault(name, []).append(Stream(samples[name], segments))
        if not self.index.streams:
            raise InputError(f"the shards in {root} hold no streams; run `longlive encode` on another data set")
        logger.info("%s: %d streams of %d folders, %d passes", root, len(self.index.streams), len(self._of_folder), self.index.passes)

    def __len__(self) -> int:
        return len(self.planner)

    def fetch(self, number: int) -> Fetched:
        broken: list[Broken] = []
        for attempt in range(self.max_broken + 1):
            stream = self._stream(number, attempt)
            if isinstance(stream, Stream):
                return Fetched(self._sample(stream, number), tuple(broken))
            broken.append(Broken(*stream, number))
        return Fetched(None, tuple(broken))

    def _stream(self, number: int, attempt: int) -> Stream | tuple[str, str]:
        """The stream of a sample, or (clip, reason) where the clip was broken when the shards were written."""
        planned = self.planner.stream(number, attempt)
        if planned.key in self.index.streams:
            return planned
        if planned.key in self.index.broken:
            return self.index.broken[planned.key]
        others = self._of_folder.get(planned.sample.name)
        if not others:
            return planned.title, "no stream of this folder is in the shards"
        return others[below(start_generator(self.planner.seed, number, attempt), len(others))]

    def _sample(self, stream: Stream, number: int) -> VideoSample:
        file = self.index.streams[stream.key][0]
        prompts, cuts = self.planner.prompts_and_cuts(stream)
        latents = self._files.tensor(file, stream.key).float()
        return VideoSample(number=number, name=stream.title, prompts=prompts, cuts=cuts, valid_chunks=len(stream.segments), latents_FCHW=latents)


class StoredText:
    """The embeddings of the text shards, as a `models.text.TextEncoder`: one float32 [n, D] per prompt. It knows the prompts of the data and ""."""

    def __init__(self, root: str | Path, device: torch.device | str = "cpu"):
        index = read_index(root)
        if index.text is None:
            raise InputError(f"{root} holds no text shards; run `longlive encode` without --no-text")
        self.root, self.device = root, torch.device(device)
        self.text_dim, self.text_len = int(index.text["text_dim"]), int(index.text["text_len"])
        self._place, self._files = index.prompts, _Files(Path(root))

    def to(self, device=None, dtype: torch.dtype | None = None) -> "StoredText":
        """Where embeddings are handed out; they stay float32."""
        self.device = torch.device(device) if device is not None else self.device
        return self

    def encode(self, prompts: list[str]) -> list[Tensor]:
        rows = []
        for prompt in prompts:
            key = prompt_key(prompt)
            if key not in self._place:
                raise InputError(f"the text shards in {self.root} hold no prompt {prompt[:60]!r}; encode the data again, or load the text encoder")
            rows.append(self._files.tensor(self._place[key], key).float().to(self.device))
        return rows


def stored_exactly(rows: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the CPU in bfloat16 where that loses nothing (a bfloat16 encoder's output), else in float32."""
    small = [row.detach().cpu().bfloat16() for row in rows]
    return [half if torch.equal(half.float(), row.detach().cpu().float()) else row.detach().cpu().float() for half, row in zip(small, rows)]
