"""`longlive export CHECKPOINT OUT`: what a training run made, a generator or a LoRA, as one file that generation, other tools and other runs read."""

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
    checkpoint: Annotated[Path, typer.Argument(help="LOGDIR (its newest checkpoint), a checkpoint in it, a generator's file, a LoRA's, or tiny-4steps.")],
    out: Annotated[Path, typer.Argument(help="File to write, such as generator.pt or generator.safetensors.")],
    ema: Annotated[bool, typer.Option("--ema", help="The average of the weights instead of the weights.")] = False,
    format: Annotated[str | None, typer.Option("--format", help="pt or safetensors; usually OUT's ending says it.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bf16 or fp32.")] = "bf16",
    layout: Annotated[str | None, typer.Option("--layout", help="Of a LoRA: published (.pt), peft (a folder), diffusers, comfyui or kohya.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Of a LoRA: the nearest one of no higher rank than this.")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Of a LoRA whose file states none, as published ones: the one it was trained with.")] = None,
) -> None:
    """Write the weights of a training checkpoint for use: a published .pt container, or safetensors. A distilled LoRA is written in any layout."""
    if _is_lora(checkpoint, dtype, {"--layout": layout, "--rank": rank, "--alpha": alpha}):
        if format is not None:
            raise InputError(f"--format {format} is for a generator, and {checkpoint} is a LoRA, whose form --layout names; leave it out")
        usual = {".pt": "published", "": "peft", ".safetensors": "comfyui"}.get(out.suffix, "published")
        from ..train.lora_export import export_lora

        about = export_lora(checkpoint, out, use_ema=ema, layout=layout or usual, dtype=_dtype(dtype), rank=rank, alpha=alpha)
        return typer.echo(f"wrote {out} ({_said(about)})")
    container = format or FORMATS.get(out.suffix)
    if container not in ("pt", "safetensors"):
        raise InputError(f"--format {format!r} is neither pt nor safetensors" if format else f"{out}: end it with .pt or .safetensors, or give --format")
    from ..train.export import export_checkpoint

    about = export_checkpoint(checkpoint, out, use_ema=ema, container=container, dtype=_dtype(dtype))
    typer.echo(f"wrote {out} ({_said(about)})")


def _is_lora(checkpoint: Path, dtype: str, of_lora: dict[str, object]) -> bool:
    """`of_lora`: the options that only a LoRA has."""
    from ..train.lora_export import trained_lora

    if dtype not in ("bf16", "fp32"):
        raise InputError(f"--dtype {dtype!r} is neither bf16 nor fp32")
    found = trained_lora(checkpoint)
    for option, given in of_lora.items():
        if given is not None and not found:
            raise InputError(f"{option} {given} is for a LoRA, and {checkpoint} is none; leave it out")
    return found


def _dtype(word: str):
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[word]


def _said(about: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items())
