"""What a golden folder holds: tensor entries and table cases, read without knowing what they mean."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ...core.errors import InputError

TABLE_SEPARATOR = "/"  # a case is called file stem / case name


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One `.safetensors` file.

    name      the file's name without its ending
    mode      which computation it records; `engines.py` maps it to code
    config    what is needed to set the computation up
    inputs    the `in/...` tensors, by name without `in/`
    outputs   the `out/...` tensors, by name without `out/` (for the judge, not for engines)
    weights   role -> state dict in float32; empty before `with_weights`
    wanted    the outputs an engine is asked for
    setting   the words of a `must_with` rule, or None
    """

    name: str
    file: str
    mode: str
    folder: Path
    config: dict[str, Any]
    tolerance: dict[str, float]
    weight_files: dict[str, str]
    inputs: dict[str, torch.Tensor] = field(repr=False)
    outputs: dict[str, torch.Tensor] = field(repr=False)
    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)
    wanted: tuple[str, ...] = ()
    setting: str | None = None

    def asking(self, wanted, setting: str | None = None) -> Entry:
        """The same entry with other outputs asked for."""
        return replace(self, wanted=tuple(wanted), setting=setting)

    def with_weights(self) -> Entry:
        """The same entry with its state dicts read, cast to float32. Raises InputError for a missing or unreadable file."""
        return replace(self, weights={role: _weights(self.folder / name) for role, name in self.weight_files.items()})


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case of a `.json` table: `input` is given, `output` is to be reproduced exactly."""

    name: str
    file: str
    case: str
    mode: str
    input: dict[str, Any]
    output: Any = field(repr=False)
    float_tolerance: float = 0.0


def read_folder(folder: Path) -> list[Entry | Case]:
    """Every entry and case of `folder`, by file name; the other files there are left alone.

    Raises InputError when the folder is missing, holds nothing to compare, or holds a file that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; give the folder that holds the golden files")
    found: list[Entry | Case] = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found += _tensor_entry(path)
        elif path.suffix == ".json" and path.name not in ("agreement.json", "index.json"):
            found += _table(path)
    if not found:
        raise InputError(f"{folder} holds no golden files (*.safetensors with a 'mode' in the metadata, *.json with 'cases'); give another folder")
    return found


def missing_from_index(folder: Path) -> list[str]:
    """Files that `index.json` names and the folder does not hold; empty without an index."""
    path = Path(folder) / "index.json"
    if not path.exists():
        return []
    listed = read_json(path).get("files", [])
    return sorted(row["file"] for row in listed if not (Path(folder) / row["file"]).exists())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError that names the file and the place."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore the file") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON (line {error.lineno}: {error.msg}); restore the file") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object; restore the file")
    return value


def _tensor_entry(path: Path) -> list[Entry]:
    """The file as an entry; an empty list when it is a weight file (no `mode`)."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "mode" not in metadata:
                return []
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no readable safetensors file ({error}); restore the file") from error
    outputs = _under("out/", tensors)
    return [
        Entry(
            name=path.name.removesuffix(".safetensors"),
            file=path.name,
            mode=metadata["mode"],
            folder=path.parent,
            config=_field(path, metadata, "config"),
            tolerance=_tolerance(path, _field(path, metadata, "tolerance")),
            weight_files=_field(path, metadata, "weights"),
            inputs=_under("in/", tensors),
            outputs=outputs,
            wanted=tuple(outputs),
        )
    ]


def _table(path: Path) -> list[Case]:
    """The cases of a table; an empty list when the file is something else."""
    table = read_json(path)
    if not {"mode", "cases"} <= set(table):
        return []
    floats = float(table.get("tolerance", {}).get("atol", 1e-5 if table["mode"] == "error_buffer" else 0.0))
    stem = path.name.removesuffix(".json")
    cases = []
    for number, case in enumerate(table["cases"]):
        if not {"name", "input", "output"} <= set(case):
            raise InputError(f"{path}: case {number} lacks one of name, input, output; restore the file")
        name = str(case["name"])
        cases.append(
            Case(
                name=stem + TABLE_SEPARATOR + name,
                file=path.name,
                case=name,
                mode=table["mode"],
                input=case["input"],
                output=case["output"],
                float_tolerance=floats,
            )
        )
    return cases


def _weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise InputError(f"the weight file {path.name} is missing; put it beside the golden files")
    try:
        return {key: value.float() for key, value in load_file(path).items()}
    except SafetensorError as error:
        raise InputError(f"{path.name} is no readable safetensors file ({error}); restore the file") from error


def _field(path: Path, metadata: dict[str, str], name: str) -> dict[str, Any]:
    """A JSON field of the metadata; absent means empty."""
    try:
        return json.loads(metadata.get(name, "{}"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: the metadata field '{name}' is no JSON ({error.msg}); restore the file") from error


def _tolerance(path: Path, given: dict[str, float]) -> dict[str, float]:
    if not {"rtol", "atol"} <= set(given):
        raise InputError(f"{path}: the metadata names no tolerance with rtol and atol; restore the file")
    return {"grad_rel_fro": 1e-3} | {name: float(value) for name, value in given.items()}


def _under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
