"""What to film: a sentence, a text file, folders of captions, images with prompts, clips with captions, or a storyboard file.

Every reader ends in `Storyboard`s whose shots are what will be shown (spec inference §9.1). A cut is where a shot begins; no string decides it.
Rules of the documented layouts:
- text file: one film per non-blank line; only trailing whitespace is removed;
- caption folder: one film per sub-folder of ROOT/caption (or of ROOT), captions ordered words first, then numbers;
- durations in chunks: shot_durations.txt, else chunks_per_shot, else an even split with the remainder to the first shots.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.errors import InputError
from ..core.geometry import CHUNK_FRAMES
from ..core.log import logger
from ..core.story import Shot, Storyboard, even_durations, fit_durations
from .images import is_image
from .storyboard_file import is_storyboard_file, read_storyboard

DURATIONS_FILE = "shot_durations.txt"
GLOBAL_CAPTION = "global.json"
FILE_SUFFIXES = (".txt", ".yaml", ".yml", ".json", ".csv")


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """How a source is read. `i2v`: True reads the image and clip layouts, False captions only, None decides by what the folder holds.

    The last four concern folders of clips only (see `longlive.data.clip_folders`).
    """

    chunk_frames: int = CHUNK_FRAMES
    chunks_per_shot: int = 0
    i2v: bool | None = None
    allow_padding: bool = False
    min_latent_frames: int = 0
    uniform_prompt: bool = False
    max_chunks_per_shot: int = 0


def read_source(source: str | Path, chunks: int | None = None, settings: SourceSettings = SourceSettings()) -> list[Storyboard]:
    """The storyboards that `source` asks for. A source that is no path is itself the prompt of one film.

    `chunks` is the length of each film; durations are fitted to it (one warning names dropped and stretched shots).
    With None, shots keep the durations that were written. Raises InputError, one line, for anything that cannot be filmed.
    """
    text = str(source)
    if os.path.exists(text):
        return read_path(text, chunks, settings)
    if not text.strip():
        raise InputError("the prompt is empty; say what the film shows, or give a prompts file, a caption folder or a storyboard")
    if _looks_like_path(text):
        raise InputError(f"{text} does not exist; give a sentence, a prompts file, a caption folder or a storyboard file")
    return [fitted(Storyboard(shots=(Shot(prompt=text.strip()),)), chunks)]


def read_path(path: str | Path, chunks: int | None = None, settings: SourceSettings = SourceSettings()) -> list[Storyboard]:
    """Like `read_source` for a path that must exist, as `data.data_path` must."""
    path = Path(path)
    if path.is_dir():
        boards = _read_folder(path, chunks, settings)
    elif path.is_file():
        boards = [read_storyboard(path, chunk_frames=settings.chunk_frames)] if is_storyboard_file(path) else _read_lines(path)
    else:
        raise InputError(f"{path} does not exist; give a prompts file, a caption folder or a storyboard file")
    return [fitted(board, chunks) for board in boards]


def _looks_like_path(text: str) -> bool:
    if any(c.isspace() for c in text.strip()):
        return text.lower().endswith(FILE_SUFFIXES) and ("/" in text or os.sep in text)
    return text.lower().endswith(FILE_SUFFIXES) or "/" in text or os.sep in text


# ---------------------------------------------------------------- text files


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file in UTF-8; save it as UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None


def _read_lines(path: Path) -> list[Storyboard]:
    if is_image(path):
        raise InputError(f"{path} is an image without a prompt; put it into a folder with a text file of the same name, or into a storyboard")
    lines = [line.rstrip() for line in _read_text(path).split("\n")]
    boards = [Storyboard(shots=(Shot(prompt=line),)) for line in lines if line.strip()]
    if not boards:
        raise InputError(f"{path} holds no prompt; write one film per line")
    return boards


# ---------------------------------------------------------------- folders


def _read_folder(root: Path, chunks: int | None, settings: SourceSettings) -> list[Storyboard]:
    if settings.i2v is not False:
        if settings.i2v and (root / "video").is_dir():
            from .clip_folders import read_clip_folders

            return read_clip_folders(root, chunks, settings)
        if settings.i2v or _holds_images(root):
            return _read_image_folder(root)
    base = root / "caption" if (root / "caption").is_dir() else root
    folders = sorted(p for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        hint = f"use {root.parent}, which holds this folder" if any(base.glob("*.json")) else "give each film a folder with 0.json, 1.json, ..."
        raise InputError(f"{base} holds no sample folders; {hint}")
    return [read_caption_folder(folder, settings.chunks_per_shot) for folder in folders]


def caption_order(path: Path) -> tuple:
    """Sort key of caption files: words first by name, then numbers by value."""
    return (1, int(path.stem), path.stem) if path.stem.isdecimal() else (0, 0, path.stem)


def read_caption(path: Path) -> str:
    """The text under `caption` in one JSON file. Raises InputError where it is missing, empty or unreadable."""
    try:
        record = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); a caption file is {{\"caption\": \"...\"}}") from None
    caption = record.get("caption") if isinstance(record, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise InputError(f"{path} has no caption; every shot needs one: {{\"caption\": \"...\"}}")
    return caption


def read_caption_folder(folder: Path, chunks_per_shot: int = 0) -> Storyboard:
    """One film: a shot per caption file of `folder`, with the documented durations. Raises InputError."""
    files = sorted((p for p in folder.glob("*.json") if p.name != GLOBAL_CAPTION), key=caption_order)
    if not files:
        raise InputError(f"{folder} holds no captions; write one JSON file per shot: 0.json, 1.json, ...")
    captions = [read_caption(p) for p in files]
    durations = read_durations(folder / DURATIONS_FILE, len(captions))
    if durations is None:
        durations = [chunks_per_shot or None] * len(captions)
    shots = tuple(Shot(prompt=caption, chunks=count) for caption, count in zip(captions, durations))
    return Storyboard(shots=shots, name=folder.name)


def read_durations(path: Path, shots: int) -> list[int] | None:
    """Chunks per shot from a shot_durations.txt, or None where there is no such file. Raises InputError unless it fits the shots."""
    if not path.exists():
        return None
    words = _read_text(path).replace(",", " ").split()
    for word in words:
        if not word.isascii() or not word.isdecimal() or int(word) < 1:
            raise InputError(f"{path}: {word!r} is no duration; write whole numbers of chunks, at least 1, separated by commas or spaces")
    if len(words) != shots:
        raise InputError(f"{path}: {len(words)} durations for {shots} shots; write one number per caption file")
    return [int(word) for word in words]


# ---------------------------------------------------------------- images with prompts


def _holds_images(root: Path) -> bool:
    folder = root / "images" if (root / "images").is_dir() else root
    return any(is_image(p) for p in folder.iterdir() if p.is_file())


def _read_image_folder(root: Path) -> list[Storyboard]:
    images = root / "images" if (root / "images").is_dir() else root
    prompts = root / "prompts" if (root / "prompts").is_dir() else images
    files = sorted((p for p in images.iterdir() if p.is_file() and is_image(p)), key=lambda p: p.name)
    if not files:
        raise InputError(f"{images} holds no images; put png, jpg, webp or bmp files there, each with a text file of the same name")
    return [_image_film(image, prompts / f"{image.stem}.txt") for image in files]


def _image_film(image: Path, prompt: Path) -> Storyboard:
    if not prompt.is_file():
        raise InputError(f"image {image} has no prompt; write {prompt}, one line per shot")
    lines = [line.strip() for line in _read_text(prompt).splitlines() if line.strip()]
    if not lines:
        raise InputError(f"{prompt} is empty; write one line per shot")
    return Storyboard(shots=tuple(Shot(prompt=line) for line in lines), name=image.name, image=str(image))


# ---------------------------------------------------------------- durations


def fit_storyboard(board: Storyboard, chunks: int) -> tuple[Storyboard, str | None]:
    """The storyboard cut or stretched to `chunks`, and what had to change in words (None: nothing)."""
    wanted = [shot.chunks for shot in board.shots]
    if None in wanted:
        if any(w is not None for w in wanted):
            raise InputError(f"{_title(board)}: some shots have a duration and some have none; give it for all or for none")
        wanted = even_durations(len(wanted), chunks)
        fitted = fit_durations(wanted, chunks)
        complaint = f"{len(wanted)} shots of at least 1" if 0 in wanted else None
    else:
        fitted, total = fit_durations(wanted, chunks), sum(wanted)
        complaint = f"durations {' + '.join(map(str, wanted))} = {total}" if total != chunks else None
    shots = tuple(replace(shot, chunks=count) for shot, count in zip(board.shots, fitted) if count)
    changed = replace(board, shots=shots)
    return changed, complaint and f"{_title(board)}: {complaint} chunks, the film has {chunks}: {_changes(board, wanted, fitted)}"


def _changes(board: Storyboard, wanted: list[int], fitted: list[int]) -> str:
    words = []
    for index, (shot, before, after) in enumerate(zip(board.shots, wanted, fitted)):
        if after == before and after:
            continue
        what = "dropped" if after == 0 else f"{'stretched' if after > before else 'cut'} from {before} to {after}"
        words.append(f"shot {index + 1} ({_start(shot.prompt)}) is {what}")
    return ", ".join(words)


def _title(board: Storyboard) -> str:
    return board.name or board.title or _start(board.shots[0].prompt)


def _start(prompt: str, length: int = 32) -> str:
    line = " ".join(prompt.split())
    return repr(line if len(line) <= length else line[: length - 3] + "...")


def fitted(board: Storyboard, chunks: int | None) -> Storyboard:
    """The storyboard at a length of `chunks` (None: as it is), with one warning when shots had to be dropped, cut or stretched."""
    if chunks is None:
        return board
    board, warning = fit_storyboard(board, chunks)
    if warning:
        logger.warning(warning)
    return board
