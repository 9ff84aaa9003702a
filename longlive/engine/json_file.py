"""A JSON file in one piece or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..core.errors import InputError


def write_json(path: Path, content: object) -> None:
    """Writes beside `path`, then renames. Raises InputError where it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); give --json a file in a writable folder") from None
