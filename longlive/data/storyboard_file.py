"""A film in one YAML file: title, seed, size, characters by name, and shots with a prompt and a duration.

    title: The red circle goes home
    seed: 7
    size: {height: 192, width: 320}
    characters:
      ball: a small red circle with a white dot
    shots:
      - prompt: "{ball} moves right across a meadow."
        chunks: 2
      - prompt: "At night, {ball} waits."
        seconds: 2.7
        image: start.png

Every error names the file and the line. `{{` and `}}` are literal braces. Paths are relative to the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..core.errors import InputError, nearest
from ..core.geometry import CHUNK_FRAMES, FPS, TEMPORAL_STRIDE, Geometry
from ..core.story import MOST_CHUNKS, Shot, Storyboard, is_text
from .videos import check_start

KEYS = ("title", "seed", "size", "characters", "image", "video", "shots")
SHOT_KEYS = ("prompt", "chunks", "seconds", "image")
SIZE_KEYS = ("height", "width")
REFERENCE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def is_storyboard_file(path: Path) -> bool:
    """Whether the file name says that this is a storyboard."""
    return path.suffix.lower() in (".yaml", ".yml")


@dataclass(frozen=True)
class Reader:
    """Strict reading of a YAML node tree, where every complaint knows its line."""

    path: Path

    def fail(self, node, message: str):
        raise InputError(f"{self.path}:{node.start_mark.line + 1}: {message}")

    def mapping(self, node, known: tuple[str, ...] | None, what: str) -> dict:
        """Key -> node. With `known`, any other key is an error that names the nearest one."""
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what} must be a mapping of keys to values")
        found = {}
        for key_node, value in node.value:
            key = str(key_node.value)
            if known is not None and key not in known:
                close = nearest(key, known)
                self.fail(key_node, f"unknown key {key!r} in {what}; " + (f"did you mean {close!r}?" if close else f"known keys: {', '.join(known)}"))
            if key in found:
                self.fail(key_node, f"{key!r} is given twice in {what}; remove one")
            found[key] = value
        return found

    def sequence(self, node, what: str) -> list:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.fail(node, f"{what} must be a list with at least one entry (lines that begin with '- ')")
        return node.value

    def text(self, node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null") or not node.value.strip():
            self.fail(node, f"{what} is empty; write a text" if isinstance(node, yaml.ScalarNode) else f"{what} must be a text (quote {{...}})")
        if not is_text(node.value):
            self.fail(node, f"{what} {ascii(node.value.strip()[:40])} holds characters that no text has; write it in UTF-8")
        return node.value.strip()

    def number(self, node, what: str, kind: type, low: float, high: float | None = None) -> float:
        """A number of at least `low` and at most `high`. `kind` int refuses fractions."""
        tags = (":int",) if kind is int else (":int", ":float")
        value = yaml.safe_load(node.value) if isinstance(node, yaml.ScalarNode) and node.tag.endswith(tags) else None
        if not isinstance(value, (int, float)) or not low <= value < float("inf") or (high and value > high):
            shown = node.value if isinstance(node, yaml.ScalarNode) else "a list or mapping"
            self.fail(node, f"{what} is {shown!r}; give a {'whole ' if kind is int else ''}number of at least {low}{f' and at most {high}' if high else ''}")
        return kind(value)


def read_storyboard(path: str | Path, chunk_frames: int = CHUNK_FRAMES) -> Storyboard:
    """The storyboard at `path`. Raises InputError with file and line for anything unknown, missing or impossible."""
    path = Path(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not valid YAML ({error.problem or error.context}); texts that hold {{ }} : or # need quotes") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{path} is not a text file in UTF-8; a storyboard is YAML text") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a storyboard file") from None
    if root is None:
        raise InputError(f"{path}:1: the storyboard is empty; it needs at least shots with a prompt")
    return _storyboard(Reader(path), root, chunk_frames)


def _storyboard(reader: Reader, root, chunk_frames: int) -> Storyboard:
    keys = reader.mapping(root, KEYS, "the storyboard")
    if "shots" not in keys:
        reader.fail(root, "the storyboard has no shots; add `shots:` with a list of prompts")
    characters = {}
    for name, node in (reader.mapping(keys["characters"], None, "characters") if "characters" in keys else {}).items():
        characters[name] = reader.text(node, f"character {name!r}")
    shots = tuple(_shot(reader, node, characters, chunk_frames) for node in reader.sequence(keys["shots"], "shots"))
    timed = [shot.chunks is not None for shot in shots]
    if any(timed) and not all(timed):
        reader.fail(keys["shots"].value[timed.index(False)], "this shot has no duration and others have one; give it to all or to none")
    if "image" in keys and "video" in keys:
        reader.fail(keys["video"], "a film starts from an image or goes on from a video, not both")
    if shots[0].image and ("image" in keys or "video" in keys):
        reader.fail(keys["shots"].value[0], "the first shot has an image and the storyboard has a start of its own; keep one")
    return Storyboard(
        shots=shots,
        name=reader.path.stem,
        title=reader.text(keys["title"], "title") if "title" in keys else "",
        seed=int(reader.number(keys["seed"], "seed", int, 0)) if "seed" in keys else None,
        size=_size(reader, keys["size"]) if "size" in keys else None,
        image=_file(reader, keys["image"]) if "image" in keys else None,
        video=_file(reader, keys["video"], clip=True) if "video" in keys else None,
        meta={"characters": characters},
    )


def _shot(reader: Reader, node, characters: dict[str, str], chunk_frames: int) -> Shot:
    keys = reader.mapping(node, SHOT_KEYS, "a shot")
    if "prompt" not in keys:
        reader.fail(node, "this shot has no prompt; say what it shows")
    if "chunks" in keys and "seconds" in keys:
        reader.fail(keys["seconds"], "a shot has chunks or seconds, not both")
    chunks = None
    if "chunks" in keys:
        chunks = int(reader.number(keys["chunks"], "chunks", int, 1, MOST_CHUNKS))
    elif "seconds" in keys:
        chunks = seconds_to_chunks(reader.number(keys["seconds"], "seconds", float, 0.01, MOST_CHUNKS), chunk_frames)
    prompt = expand(reader, keys["prompt"], reader.text(keys["prompt"], "prompt"), characters)
    return Shot(prompt=prompt, chunks=chunks, image=_file(reader, keys["image"]) if "image" in keys else None)


def seconds_to_chunks(seconds: float, chunk_frames: int = CHUNK_FRAMES) -> int:
    """The nearest number of whole chunks, at least one (a chunk of 8 latent frames is 32 frames, 1.33 s)."""
    return max(1, round(seconds * FPS / (TEMPORAL_STRIDE * chunk_frames)))


def expand(reader: Reader, node, text: str, characters: dict[str, str]) -> str:
    """`text` with every {name} replaced by that character's description."""

    def swap(match: re.Match) -> str:
        whole, name = match.group(0), match.group(1)
        if whole in ("{{", "}}"):
            return whole[0]
        if name is None:
            reader.fail(node, f"a single {whole!r} in the prompt; write {whole * 2!r} for the sign itself")
        if name not in characters:
            close = nearest(name, characters)
            remedy = f"did you mean {{{close}}}?" if close else f"add it under `characters:` (known: {', '.join(characters) or 'none'})"
            reader.fail(node, f"unknown character {{{name}}}; {remedy}")
        return characters[name]

    return REFERENCE.sub(swap, text)


def _size(reader: Reader, node) -> tuple[int, int]:
    keys = reader.mapping(node, SIZE_KEYS, "size")
    missing = [key for key in SIZE_KEYS if key not in keys]
    if missing:
        reader.fail(node, f"size has no {missing[0]}; write size: {{height: 192, width: 320}}")
    size = tuple(int(reader.number(keys[key], key, int, 1)) for key in SIZE_KEYS)
    try:
        Geometry(*size)
    except InputError as error:
        reader.fail(node, str(error))
    return size


def _file(reader: Reader, node, clip: bool = False) -> str:
    path = reader.path.parent / reader.text(node, "path")
    if not path.is_file():
        reader.fail(node, f"{path} does not exist; paths are relative to the storyboard file")
    try:
        check_start(path, clip=clip)
    except InputError as error:
        reader.fail(node, str(error))
    return str(path)
