"""`longlive data check ROOT`: whether a folder of videos and captions can be trained on, and what in it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import OVERRIDES, split_overrides

SHOWN = 20  # files that the table names; --json names all


def register(app: typer.Typer) -> None:
    """Adds the `data` group."""
    group = typer.Typer(help="Training data.", no_args_is_help=True)
    group.callback()(lambda: None)  # so that the only command keeps its name
    group.command("check", context_settings=OVERRIDES)(check)
    app.add_typer(group, name="data")


def check(
    ctx: typer.Context,
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder with video/<sample>/0.mp4 and caption/<sample>/0.json.")],
    config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="Training configuration that the data are for.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Play every clip to its end (slow): finds damage inside files.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Validate a training set: counts, lengths, sizes, rates, missing captions, unreadable clips, folders too short for the configuration.

    Without --config or key=value words a folder is long enough when it fills one chunk. Exit code 2 when nothing can be used.
    """
    import json as text
    from dataclasses import replace

    from ..config import default_config, load_config
    from ..core.errors import InputError
    from ..data.check import check_dataset
    from ..data.manifest import index_dataset
    from ..data.open import sample_size, sampling_rules
    from .bar import Bar

    overrides = split_overrides(ctx.args)
    given = config is not None or bool(overrides)
    settings = load_config(config, overrides) if config is not None else default_config("tiny", overrides)
    rules, size = sampling_rules(settings), sample_size(settings) if given else None
    with Bar("clips opened") as bar:
        manifest = index_dataset(root, settings.data.manifest_path, bar.at)
    with Bar("clips played") as bar:
        total = sum(len(sample.clips) for sample in manifest.samples)
        report = check_dataset(manifest, rules if given else replace(rules, chunks=None), size, decode=decode, on_clip=lambda: bar.step(total))
    if json:
        typer.echo(text.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        _print(report, size)
    if not report.usable:
        raise InputError(f"{root}: nothing can be used: {report.clips} clips in {report.folders} folders, {len(report.short)} of them too short")


def _print(report, size) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{report.root}: {report.usable} of {report.folders} folders can be used"), show_header=False)
    spread = "{0:.4g} / {1:.4g} / {2:.4g} (least, median, most)"
    rows = [
        ("clips", f"{report.clips} ({report.hours:.3g} hours{', all played' if report.decoded else ''})"),
        ("seconds of a clip", spread.format(*report.clip_seconds)),
        ("chunks of a folder", spread.format(*report.folder_chunks) + f", {report.chunks_needed} needed"),
        ("words of a caption", spread.format(*report.caption_words)),
        ("frames per second", _counted(report.rates)),
        ("height x width", _counted(report.sizes)),
    ]
    if size is not None:
        rows.append(("stretched", f"{report.stretched} clips have other proportions than {size.height}x{size.width}"))
    rows += [(f"left out: {kind}", str(count)) for kind, count in report.kinds.items()]
    for name, words in rows:
        table.add_row(name, escape(words))
    console = Console(soft_wrap=True)
    console.print(table)
    named = [f"{p.file}: {p.kind}: {p.reason}" for p in report.problems]
    named += [f"{name}: too short: fills {chunks} of {report.chunks_needed} chunks" for name, chunks in report.short]
    for line in named[:SHOWN]:
        console.print(line, markup=False, highlight=False)
    if len(named) > SHOWN:
        console.print(f"and {len(named) - SHOWN} more; --json names all", markup=False, highlight=False)


def _counted(counts: dict[str, int], most: int = 4) -> str:
    words = [f"{name} ({count})" for name, count in list(counts.items())[:most]]
    return ", ".join(words) + (f", {len(counts) - most} others" if len(counts) > most else "")
