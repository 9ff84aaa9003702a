"""Prompt layouts: read a recorded directory tree with our reader and list, chunk by chunk, prompts and cuts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ...core.errors import InputError
from ...core.story import SCENE_CUT_PREFIX, Storyboard, plan
from ...data.prompts import SourceSettings, read_path

KNOWN_ARGUMENTS = ("num_blocks", "chunks_per_shot", "scene_cut_prefix")
PICTURE = "<png>"


def _prompts_only(output: dict) -> dict:
    return {"samples": [{"name": s["name"], "prompts": s["prompts"]} for s in output["samples"]]}


SETTINGS = {"prompts only; cuts come from the shots, not from the string": _prompts_only}


def run_case(name: str, given: dict) -> dict:
    """`given`: files (path -> text), data_path, kwargs, optional dataset. Raises InputError where our reader refuses."""
    arguments = given["kwargs"]
    unknown = [key for key in arguments if key not in KNOWN_ARGUMENTS]
    if unknown:
        raise InputError(f"{name}: {unknown[0]} = {arguments[unknown[0]]!r} is not supported; captions are under `caption`")
    images = given.get("dataset") == "ImagePromptDataset"
    settings = SourceSettings(chunks_per_shot=arguments.get("chunks_per_shot", 0), i2v=images)
    prefix = arguments.get("scene_cut_prefix", SCENE_CUT_PREFIX)
    with tempfile.TemporaryDirectory() as folder:
        _write_tree(Path(folder), given["files"])
        boards = read_path(Path(folder) / given["data_path"], arguments["num_blocks"], settings)
    return {"samples": [_sample(board, arguments["num_blocks"], prefix) for board in boards]}


def _sample(board: Storyboard, chunks: int, prefix: str) -> dict:
    """`cut_trainer` is the recorded trainer's mask; ours has one source of cuts, so both columns are the same."""
    plans = plan(board, chunks, prefix)
    cuts = [p.cut for p in plans]
    return {"name": board.name or None, "prompts": [p.prompt for p in plans], "cut_pipeline": cuts, "cut_trainer": list(cuts)}


def _write_tree(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if text == PICTURE:
            _write_picture(target)
        else:
            target.write_text(text, encoding="utf-8")


def _write_picture(target: Path) -> None:
    from PIL import Image

    picture = Image.new("RGB", (32, 32), (200, 40, 40))
    picture.save(target, format={".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}.get(target.suffix.lower(), "JPEG"))
