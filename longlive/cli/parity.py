"""`longlive parity DIR`: recompute the golden files of a folder and say how far off we are."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import CheckFailed, InputError


def register(app: typer.Typer) -> None:
    app.command("parity")(parity)


def parity(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with golden files (*.safetensors, *.json).")],
    require: Annotated[str, typer.Option(metavar="GLOB,...", help="Entries that must have an engine; without one they count as failed.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as well.")] = None,
) -> None:
    """Recompute each golden file in DIR under its agreement.json. Exit code 1 when one fails.

    A glob without a slash names files (dit_*, keys.json); one with a slash names cases of a table (prompts/durations_*).
    The last line counts entries; an entry is a .safetensors file or one case of a .json table.
    """
    from ..evaluation.parity import check_folder, summary
    from ..evaluation.parity.entries import missing_from_index

    globs = [glob.strip() for glob in require.split(",") if glob.strip()]
    results = []
    for result in check_folder(folder, globs):
        if not results:
            print(f"{'status':<10}{'entry':<42}{'max error':>10}  {'of tolerance':>12}  tolerance")
        results.append(result)
        _show(result)
    for name in missing_from_index(folder):
        print(f"note: index.json lists {name}, which is not in {folder}")
    counts = summary(results)
    if json_file is not None:
        _write(json_file, {"folder": str(folder), "counts": counts, "results": [_plain(result) for result in results]})
        print(f"written: {json_file}")
    print(f"passed {counts['passed']} failed {counts['failed']} left-out {counts['left-out']} no-engine {counts['no-engine']}")
    if counts["failed"]:
        raise typer.Exit(CheckFailed.exit_code)


def _show(result) -> None:
    error = "" if result.error is None else f"{result.error:.2e}"
    share = "" if result.share is None else f"{result.share:.1%}"
    print(f"{result.status:<10}{result.name:<42}{error:>10}  {share:>12}  {result.tolerance}")
    for note in result.notes:
        print(f"{'':<12}{note}")
    reasons: dict[str, list[str]] = {}
    for name, why in result.left_out.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        print(f"{'':<12}left out {', '.join(names)}: {why}")


def _plain(result) -> dict:
    """The result as JSON values; an infinite error (missing, wrong shape, NaN) is null, and the notes say why."""
    row = asdict(result)
    return row | {key: row[key] if row[key] is None or math.isfinite(row[key]) else None for key in ("error", "share")}


def _write(path: Path, value: dict) -> None:
    """JSON, whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); give a file in a folder that exists and is writable") from error
