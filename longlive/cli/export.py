"""`longlive export CHECKPOINT OUT`: the generator of a training run as one file that generation, other tools and other runs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError

FORMATS = {".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}


def register(app: typer.Typer) -> None:
    """Adds the `export` command."""
    app.command()(export)


def export(
    checkpoint: Annotated[Path, typer.Argument(help="LOGDIR (its newest checkpoint), a checkpoint in it, or any generator file.")],
    out: Annotated[Path, typer.Argument(help="File to write, such as generator.pt or generator.safetensors.")],
    ema: Annotated[bool, typer.Option("--ema", help="The average of the weights instead of the weights.")] = False,
    format: Annotated[str | None, typer.Option("--format", help="pt or safetensors; usually OUT's ending says it.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bf16 or fp32.")] = "bf16",
) -> None:
    """Write the weights of a training checkpoint for use: a published .pt container, or safetensors."""
    container = format or FORMATS.get(out.suffix)
    if container not in ("pt", "safetensors"):
        raise InputError(f"--format {format!r} is neither pt nor safetensors" if format else f"{out}: end it with .pt or .safetensors, or give --format")
    if dtype not in ("bf16", "fp32"):
        raise InputError(f"--dtype {dtype!r} is neither bf16 nor fp32")
    import torch

    from ..train.export import export_checkpoint

    about = export_checkpoint(checkpoint, out, use_ema=ema, container=container, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    typer.echo(f"wrote {out} ({', '.join(f'{key} {value}' for key, value in about.items())})")
