"""Names of a film's files: documented where the prompt allows it, safe and unique where it does not.

    rank{rank}-{first 100 characters of the prompt, or the index}-{sample}_{tag}      (spec inference §9.2, §7)

Signs that a file system or a shell trips over become `_`, the text is cut to `TEXT_BYTES` of UTF-8, and films of one run whose names would
be equal get a short hash of their prompt. Beside the film: `_prompts.txt` and the receipt `.json`.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import InputError
from ..core.story import ChunkPlan

PROMPT_CHARACTERS = 100
TEXT_BYTES = 180
UNSAFE = re.compile(r"""[/\\:*?"'<>|`$\x00-\x1f\x7f]""")
HASH_DIGITS = 8


def safe_text(text: str) -> str:
    """At most 100 characters and `TEXT_BYTES` bytes of `text` that every file system takes. "film" when nothing is left."""
    text = unicodedata.normalize("NFC", re.sub(r"\s", " ", text))[:PROMPT_CHARACTERS]
    text = "".join("_" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in UNSAFE.sub("_", text))
    text = text.encode("utf-8")[:TEXT_BYTES].decode("utf-8", errors="ignore")
    return text if text.strip() else "film"


def film_texts(prompts: Sequence[str], indices: Sequence[int], save_with_index: bool = False) -> list[str]:
    """The middle part of each film's name. `prompts` are the prompts of the first chunk, `indices` their places in the source.

    Unique within the call, in letter-case-blind file systems too. The same film keeps its name when others are added, unless names collide.
    """
    if save_with_index:
        return [str(index) for index in indices]
    texts = [safe_text(prompt) for prompt in prompts]
    count = Counter(text.casefold() for text in texts)
    named = []
    for text, prompt, index in zip(texts, prompts, indices):
        if count[text.casefold()] > 1:
            digest = hashlib.sha256(f"{index}\n{prompt}".encode("utf-8", errors="replace")).hexdigest()[:HASH_DIGITS]
            text = f"{text}-{digest}"
        named.append(text)
    return named


def film_tag(config) -> str:
    """The last word of names: lora with live adapters (merged ones do not show), else ema or regular, by the weights that were asked for."""
    if config.adapter is not None and not config.merge_lora:
        return "lora"
    return "ema" if config.inference.use_ema else "regular"


def shared_tag(tag: str, group: int, groups: int, ranks: int) -> str:
    """`tag` of films that each are made by `ranks` ranks together: with _sp{ranks}, or of several groups with _dp{group}_sp{ranks}."""
    if ranks == 1:
        return tag
    return f"{tag}_sp{ranks}" if groups == 1 else f"{tag}_dp{group}_sp{ranks}"


def base_name(rank: int, text: str, sample: int, tag: str) -> str:
    """rank{rank}-{text}-{sample}_{tag}. `tag` is regular, lora or ema, and how ranks shared the film (`shared_tag`)."""
    return f"rank{rank}-{text}-{sample}_{tag}"


def prompts_text(plans: Sequence[ChunkPlan]) -> str:
    """The documented prompts file: consecutive equal prompts merged, one entry `[i,j,k] text` each, chunks numbered from 0."""
    runs: list[tuple[list[int], str]] = []
    for index, plan in enumerate(plans):
        if runs and runs[-1][1] == plan.prompt:
            runs[-1][0].append(index)
        else:
            runs.append(([index], plan.prompt))
    return "".join(f"[{','.join(map(str, chunks))}] {text}\n" for chunks, text in runs)


def check_free(paths: Sequence[Path], overwrite: bool) -> None:
    """Raises InputError when one of the files exists and `overwrite` is off."""
    taken = [path for path in paths if path.exists()]
    if taken and not overwrite:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise InputError(f"{taken[0]}{more} exists already; give --overwrite to replace it, or another folder with --output")


def check_folder(folder: Path, remedy: str = "give a folder that you may write to with --output") -> None:
    """Raises InputError when `folder` cannot be written to, or cannot be made, as far as that is known without making it."""
    import os

    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"cannot write into {folder} ({place} is not a folder); {remedy}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"cannot write into {folder} (no permission for {place}); {remedy}")


def make_folder(folder: Path) -> list[Path]:
    """Makes `folder`, proves that a file can be written there, and returns the folders that it had to make, innermost first. Raises InputError."""
    import tempfile

    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        remove_empty(made)
        raise InputError(f"cannot write into {folder} ({error.strerror}); free some space or give another folder with --output") from None
    return made


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, innermost first, until one holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return  # it holds something, or was never made
