"""Weight files on disk: where the parts are, what is wrong with them, and their tensors mapped into memory.

The one idea: opening reads names and shapes only. Tensors are views of the mapped file; a page is read when it is touched and can be given back
(`release`) once its tensor has been converted, so that a large file never sits in memory beside the model made from it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core.errors import CheckpointError, nearest

SHARD = re.compile(r"(?P<stem>.+)-(?P<at>\d{5})-of-(?P<count>\d{5})(?P<ending>\.safetensors)$")
TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
SHARD_INDEX = ".metadata"  # of torch.distributed.checkpoint: what training writes (train.checkpoint)
RUN_FILE = "run.json"
RUN_ENTRIES = ("step", "trainer", "files")  # of run.json: what reading weights needs
TRAINED = ("generator", "generator_ema", "generator_lora", "generator_lora_ema", "critic", "critic_lora")
FETCH = "fetch it again, or check the path"
MADV_DONTNEED = 4


def locate(path: str | Path) -> list[Path]:
    """The files that make up the weights at `path`: one file, all shards of which it is one, what an index names, or what a folder holds.

    Raises CheckpointError for a path that is not there, a folder without weights or with several, and for a missing shard.
    """
    path = Path(path)
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}{_near(path)}; check the path, or see `longlive doctor` for where weights come from")
    if path.name.endswith(".index.json"):
        return _indexed(path)
    shard = SHARD.match(path.name)
    return _siblings(path.parent, shard) if shard else [path]


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    close = nearest(path.name, [p.name for p in path.parent.iterdir()])
    return f" (did you mean {path.parent / close}?)" if close else ""


def _in_folder(folder: Path) -> list[Path]:
    if (folder / SHARD_INDEX).is_file():
        return [folder / SHARD_INDEX]
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _indexed(indexes[0])
    files = sorted(folder.glob("*.safetensors"))
    stems = {(m["stem"] if (m := SHARD.match(f.name)) else f.name): f for f in files}
    if len(stems) == 1:
        return locate(files[0])
    files = files or sorted(f for f in folder.iterdir() if f.suffix in TORCH_ENDINGS)
    if len(files) == 1:
        return files
    found = ", ".join(f.name for f in files[:4]) or "nothing"
    raise CheckpointError(f"{folder} is a folder and holds {found} as weights, not one model (an index, safetensors); name one file, or fetch the rest")


def _siblings(folder: Path, shard: re.Match) -> list[Path]:
    count = int(shard["count"])
    paths = [folder / f"{shard['stem']}-{i:05d}-of-{shard['count']}{shard['ending']}" for i in range(1, count + 1)]
    return _all_there(paths)


def _indexed(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} is not an index of weight files (no weight_map); {FETCH}") from None
    return _all_there([index.parent / name for name in names])


def _all_there(paths: list[Path]) -> list[Path]:
    missing = [p for p in paths if not p.is_file()]
    if missing:
        raise CheckpointError(f"{missing[0]} is missing: {len(paths) - len(missing)} of {len(paths)} parts are there; fetch the rest")
    return paths


def open_file(path: Path) -> tuple[Mapping[str, Any], dict[str, Any], bool]:
    """(content, metadata, whether the tensors are views of the mapped file). Raises CheckpointError for what is empty, truncated or no weight file.

    Of a training checkpoint (the SHARD_INDEX of its folder) the entries are read when their tensors are asked for.
    """
    if path.name == SHARD_INDEX:
        return _open_sharded(path.parent)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if size == 0:
        raise CheckpointError(f"{path} is empty; {FETCH}")
    if head.startswith(b"version https://"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`, or fetch the file itself")
    return _open_safetensors(path, size, head) if path.suffix == ".safetensors" else _open_torch(path, head)


def _open_sharded(folder: Path) -> tuple[dict[str, Any], dict[str, Any], bool]:
    sizes = sharded_sizes(folder)
    groups = {entry: {n.removeprefix(f"{entry}."): s for n, s in sizes.items() if n.startswith(f"{entry}.")} for entry in TRAINED}
    try:
        run = run_record(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged ({error}); take another checkpoint") from None
    about = {"trainer": run["trainer"], "step": run["step"], **run.get("origin", {})}
    config = run.get("config", {})
    adapter = config.get("adapter") or {}
    about |= {"lora_alpha": adapter["alpha"]} if adapter.get("alpha") else {}
    if run["trainer"] == "score_distillation":
        stated = {"steps": config.get("inference", {}).get("sampling_steps"), "seed": config.get("logging", {}).get("seed")}
        about |= {name: str(value) for name, value in stated.items() if value is not None}
    return {entry: _Group(folder, entry, found) for entry, found in groups.items() if found}, about, False


def run_record(folder: Path, entries: Sequence[str] = ()) -> dict[str, Any]:
    """run.json of a training checkpoint. Raises OSError or ValueError where it, one of RUN_ENTRIES or `entries`, or a file that it lists is missing or of
    another size.
    """
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    absent = [entry for entry in (*RUN_ENTRIES, *entries) if not isinstance(run, dict) or entry not in run]
    if absent:
        raise ValueError(f"{RUN_FILE} has no {absent[0]}")
    for name, size in run["files"].items():
        if (found := (folder / name).stat().st_size) != size:
            raise ValueError(f"{name} has {found} bytes of {size}")
    return run


def sharded_sizes(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, type) of every tensor in a training checkpoint. Raises CheckpointError where its index cannot be read."""
    from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

    try:
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, LookupError, AttributeError, TypeError, ImportError) as error:
        raise CheckpointError(f"{folder / SHARD_INDEX} cannot be read ({_first_line(error)}); take another checkpoint") from None
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


class _Group(Mapping):
    """The tensors of one entry of a training checkpoint, whole, read together from all ranks' files when the first is asked for."""

    def __init__(self, folder: Path, entry: str, sizes: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self.folder, self.entry, self.sizes, self.tensors = folder, entry, sizes, None

    def __iter__(self):
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, name: str) -> Tensor:
        if self.tensors is None:
            self.tensors = read_sharded(self.folder, {f"{self.entry}.{n}": s for n, s in self.sizes.items()})
        return self.tensors[f"{self.entry}.{name}"]


def read_sharded(folder: Path, sizes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Whole tensors by their full names, in memory, whoever wrote them; only this process takes part. Raises CheckpointError for a damaged file."""
    import torch.distributed.checkpoint as dcp

    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in sizes.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a single process reads
            dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError, dcp.CheckpointException) as error:
        raise CheckpointError(f"{folder} is damaged ({_first_line(error)}); take another checkpoint") from None
    return tensors


def _open_safetensors(path: Path, size: int, head: bytes) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    (length,) = struct.unpack("<Q", head[:8].ljust(8, b"\0"))
    if head[8:9] != b"{" and size > 8:
        raise CheckpointError(f"{path} is not a safetensors file; {FETCH}")
    try:
        with path.open("rb") as file:
            file.seek(8)
            header = json.loads(file.read(length)) if 8 + length <= size else None
        end = 8 + length + max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0) if header else size + 1
        if size < end:
            raise CheckpointError(f"{path} is truncated: {size} bytes{f' of {end}' if header else ''}; fetch it again")
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}), True
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a readable safetensors file ({_first_line(error)}); {FETCH}") from None


def _open_torch(path: Path, head: bytes) -> tuple[Mapping[str, Any], dict[str, Any], bool]:
    zipped = head.startswith(b"PK\x03\x04")
    if not zipped and not head.startswith(b"\x80"):
        raise CheckpointError(f"{path} is not a weight file (neither safetensors nor torch); {FETCH}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read raises
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if zipped:
            raise CheckpointError(f"{path} holds Python objects beside tensors, which are not run ({_reason(error)}); save only its state dict") from None
        raise CheckpointError(f"{path} is truncated or no torch file; fetch it again") from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is truncated or damaged; fetch it again") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors; save a state dict")
    return content, {}, zipped


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__


def _reason(error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found.group(1) if found else _first_line(error)


def release(tensor: Tensor) -> None:
    """Gives the memory pages of a tensor of a mapped file back to the system. The tensor stays valid: its pages are read again when touched.

    Only for tensors that `open_file` mapped and that nobody has written to. Does nothing where the system has no madvise.
    """
    libc = _libc()
    if libc is None or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    start, stop = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    if stop > start:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_DONTNEED)


def _libc():
    if os.name != "posix" or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    return ctypes.CDLL(None)
