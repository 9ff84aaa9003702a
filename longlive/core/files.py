"""What writers of files share."""

from __future__ import annotations

from pathlib import Path


def share(path: Path) -> None:
    """Gives `path` the mode of any new file in its folder: a library that writes through a private temporary file leaves 600. Raises OSError."""
    new = path.with_name(path.name + ".mode")
    try:
        new.touch()  # by example: a process can ask for its umask only by changing it, for all its threads
        mode = new.stat().st_mode
        if path.stat().st_mode != mode:  # a mount without modes refuses every change
            path.chmod(mode & 0o777)
    finally:
        new.unlink(missing_ok=True)
