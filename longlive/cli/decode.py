"""`longlive decode`: saved latents into videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import OVERRIDES, split_overrides

Fps = Annotated[int, typer.Option("--fps", min=1, help="Frames per second of the videos.")]
Pattern = Annotated[str, typer.Option("--pattern", help="Which files of the folder are latents.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace videos that exist.")]


def register(app: typer.Typer) -> None:
    app.command("decode", context_settings=OVERRIDES)(decode)


def decode(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File of latents (.pt) or a folder of them.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder for the videos; default beside the latents.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Whose VAE; default what the receipt says, else tiny.")] = None,
    fps: Fps = 24,
    pattern: Pattern = "*.pt",
    overwrite: Overwrite = False,
) -> None:
    """Decode saved latents into videos. Trailing key=value words change settings, such as inference.vae_type=mg_lightvae."""
    from ..config import default_config
    from ..engine.decode_files import latent_files, model_of

    files = latent_files(path, pattern)
    found = model_of(files[0])
    overrides = split_overrides(ctx.args)
    if model is None and found is not None:
        overrides = [f"inference.vae_type={found[1]}", *overrides]
    config = default_config(model or (found[0] if found else "tiny"), overrides)
    targets = [(output or file.parent) / f"{file.stem}.mp4" for file in files]
    decode_all(config, files, targets, fps, overwrite)


def decode_all(config, files: list[Path], targets: list[Path], fps: int, overwrite: bool, place: dict | None = None) -> None:
    """Decodes each of `files` into its target. `place` says where the VAE's checkpoint is (see `engine.parts.load_codec`)."""
    from ..engine.decode_files import decode_file, load_latents
    from ..engine.naming import check_folder, check_free, make_folder, remove_empty
    from ..engine.parts import load_codec
    from ..engine.pipeline import choose_device
    from ..models.spec import model_spec

    check_free(targets, overwrite)
    if not files:
        return
    load_latents(files[0])
    check_folder(targets[0].parent)
    codec, _ = load_codec(config, model_spec(config.model_kwargs.model_name), choose_device(config), **(place or {}))
    made = make_folder(targets[0].parent)
    try:
        for file, target in zip(files, targets):
            typer.echo(f"{target}  ({decode_file(codec, file, target, fps)} frames)")
    finally:
        remove_empty(made)
