"""Writes the shards that `data.shards` reads: each file whole or not at all, and a stopped run goes on with the first file that is missing.

The files of a job are planned before anything is decoded, so that every process knows them all: process r of w writes files r, r + w, ... A file says in its
metadata which job it belongs to, which streams it holds and which of them were broken. Streams that a broken clip prevented are planned again with the next
attempt, as the video path does, and go into further files. Whoever finds all files written writes the index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..core.errors import InputError
from ..core.files import share
from ..models.codec import VideoCodec
from .encoding import encode_frames
from .shards import FORMAT, INDEX, ShardIndex, prompt_key, stored_exactly
from .sources import Planner, Stream, UnreadableClip, VideoSource, few

PROMPTS_OF_A_FILE = 512


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What is written where. `per_file` streams of `dtype` go into one file; `data` and `codec_is` name the data set and the VAE."""

    out: Path
    passes: int
    per_file: int
    data: str
    codec_is: Mapping[str, str]
    dtype: torch.dtype = torch.float32
    workers: int = 2
    rank: int = 0
    processes: int = 1

    def name(self, source: VideoSource) -> str:
        """Equal for jobs that write the same files."""
        planner, g = source.planner, source.geometry
        parts = [asdict(planner.rules), planner.seed, self.passes, self.per_file, str(self.dtype), g.height, g.width, dict(self.codec_is), self.data]
        return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Progress:
    """Files and streams done of those planned so far, by this process or found."""

    file: str
    streams_done: int
    streams: int


def encode_streams(job: ShardJob, source: VideoSource, codec: VideoCodec, on_file: Callable[[Progress], None] | None = None) -> ShardIndex | None:
    """Encodes all streams of the job's passes. Returns the index without text, or None where other processes have files left to write.

    Raises InputError when the folder holds shards of another job, or more clips are broken than `source.max_broken`.
    """
    out, name = _folder(job.out), job.name(source)
    streams: dict[str, tuple[str, Stream]] = {}
    broken: dict[str, tuple[str, str]] = {}
    files = known = 0
    fresh = planned_streams(source.planner, job.passes, broken, source.max_broken)
    while fresh:
        known += len(fresh)
        before = len(broken)
        for at in range(0, len(fresh), job.per_file):
            part, path = fresh[at : at + job.per_file], out / f"latents-{files:05d}.safetensors"
            if files % job.processes == job.rank and not path.exists():
                _write_file(path, part, job, name, source, codec)
            files += 1
            if path.exists():
                broken.update(_found(path, name, part))
                _check_broken(source, broken)
                streams.update({s.key: (path.name, s) for s in part})
                if on_file is not None:
                    on_file(Progress(path.name, len(streams), known))
        if len(streams) < known:
            return None
        again = planned_streams(source.planner, job.passes, broken, source.max_broken) if len(broken) > before else []
        fresh = [stream for stream in again if stream.key not in streams]
    held = {key: (file, s.sample.name, s.segments) for key, (file, s) in streams.items() if key not in broken}
    planner = source.planner
    if not held:
        named = few([f"{file} ({reason})" for file, reason in dict(broken.values()).items()])
        raise InputError(f"none of the {len(broken)} streams could be read: {named}; repair or replace these clips")
    return ShardIndex(
        rules=planner.rules, seed=planner.seed, passes=job.passes, height=source.geometry.height, width=source.geometry.width,
        codec=dict(job.codec_is), text=None, data=job.data, samples=planner.samples, streams=held, broken=broken, prompts={},
    )  # fmt: skip


def planned_streams(planner: Planner, passes: int, broken: Mapping[str, Any], attempts: int) -> list[Stream]:
    """The different streams of samples 0 ... passes x folders, in order of first use, as far as the known broken ones decide them."""
    found: dict[str, Stream] = {}
    for number in range(passes * len(planner)):
        for attempt in range(attempts + 1):
            stream = planner.stream(number, attempt)
            found.setdefault(stream.key, stream)
            if stream.key not in broken:
                break
    return list(found.values())


class _Decoding(Dataset):
    """Streams as frames, or the clip and reason why not; decoded by workers."""

    def __init__(self, source: VideoSource, streams: Sequence[Stream]):
        self.source, self.streams = source, streams

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, index: int) -> Tensor | tuple[str, str]:
        try:
            return self.source.frames(self.streams[index])
        except UnreadableClip as error:
            return error.file, str(error)


def _write_file(path: Path, streams: Sequence[Stream], job: ShardJob, name: str, source: VideoSource, codec: VideoCodec) -> None:
    loader = DataLoader(_Decoding(source, streams), batch_size=None, num_workers=job.workers, collate_fn=_unchanged, generator=torch.Generator())
    tensors, broken = {}, {}
    for stream, frames in zip(streams, loader):
        if isinstance(frames, Tensor):
            tensors[stream.key] = encode_frames(codec, frames[None])[0].to("cpu", job.dtype)
        else:
            broken[stream.key] = frames
    write_tensors(path, tensors, {"job": name, "streams": [s.key for s in streams], "broken": broken})


def _unchanged(item):
    return item


def _found(path: Path, name: str, streams: Sequence[Stream]) -> dict[str, tuple[str, str]]:
    """The broken streams of a file that is there. Raises InputError where it belongs to another job."""
    metadata = read_metadata(path)
    if metadata.get("job") != name or metadata["streams"] != [s.key for s in streams]:
        raise InputError(f"{path} belongs to another job (other data, settings or VAE); give an empty folder, or remove what is there with --overwrite")
    return {key: (file, reason) for key, (file, reason) in metadata["broken"].items()}


def _check_broken(source: VideoSource, broken: Mapping[str, tuple[str, str]]) -> None:
    clips = {file: reason for file, reason in [*((b.file, b.reason) for b in source.unreadable), *broken.values()]}
    if len(clips) > source.max_broken:
        named = few([f"{file} ({reason})" for file, reason in clips.items()])
        raise InputError(f"{len(clips)} clips are broken: {named}; repair or remove them, or raise data.max_broken_clips({source.max_broken})")


# ---------------------------------------------------------------- text


def prompts_of(index: ShardIndex) -> list[str]:
    """Every prompt that a sample of the data may have, with and without the prefix of a cut, and the empty one; sorted."""
    captions = {clip.caption for sample in index.samples for clip in sample.clips}
    prefix = index.rules.scene_cut_prefix
    return sorted({"", *captions, *(prefix + caption for caption in captions)})


def encode_texts(out: Path, prompts: Sequence[str], encode: Callable[[list[str]], list[Tensor]], name: str) -> dict[str, str]:
    """Writes embeddings in files of `PROMPTS_OF_A_FILE` and returns the file of each prompt's key. `name` identifies the text encoder."""
    places: dict[str, str] = {}
    for number, at in enumerate(range(0, len(prompts), PROMPTS_OF_A_FILE)):
        part, path = list(prompts[at : at + PROMPTS_OF_A_FILE]), _folder(out) / f"text-{number:05d}.safetensors"
        keys = [prompt_key(prompt) for prompt in part]
        stamp = {"job": name, "prompts": hashlib.sha256("".join(keys).encode()).hexdigest()}
        if not path.exists():
            write_tensors(path, dict(zip(keys, stored_exactly(encode(part)))), stamp)
        elif {key: read_metadata(path).get(key) for key in stamp} != stamp:
            raise InputError(f"{path} belongs to another job (other captions or text encoder); give an empty folder, or remove what is there with --overwrite")
        places.update(dict.fromkeys(keys, path.name))
    return places


# ---------------------------------------------------------------- files


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """A safetensors file that appears whole or not at all; equal content gives equal bytes. Raises InputError when the disk refuses."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(partial), {FORMAT: json.dumps(metadata)})
        share(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path} ({error}); free some space or give another folder") from None
    finally:
        partial.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says about itself. Raises InputError where it is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return json.loads((file.metadata() or {}).get(FORMAT, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and run again") from None


def write_index(out: Path, index: ShardIndex) -> Path:
    """index.json, whole or not at all: with it the shards are complete."""
    path = out / INDEX
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(index.to_json(), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path} ({error.strerror}); free some space or give another folder") from None
    return path


def written(out: Path) -> Iterator[Path]:
    """Everything that a job of this kind wrote into a folder."""
    for pattern in (INDEX, "latents-*.safetensors", "text-*.safetensors", "*.tmp"):
        yield from sorted(out.glob(pattern))


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {out} ({error.strerror}); give a folder that you may write to") from None
    return out
