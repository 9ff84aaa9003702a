"""The two documented scripts that decode saved latents. Under torchrun the ranks share the files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .scripts import script  # isort: skip  (brings in the application, which registers .decode)
from .decode import Fps, Overwrite, Pattern, decode_all

decode_vae = script("decode_vae_latents")
decode_light = script("decode_lightvae_latents")


@decode_vae.command()
def vae(
    input_dir: Annotated[Path, typer.Option("--input_dir", help="Folder of latents.")],
    output_dir: Annotated[Path | None, typer.Option("--output_dir", help="Folder for the videos; default input_dir.")] = None,
    fps: Fps = 24,
    pattern: Pattern = "*.pt",
    overwrite: Overwrite = False,
) -> None:
    """Decode saved latents with the VAE that belongs to them (the receipt says which; without one Wan2.2's). Ranks share the files."""
    from ..config import default_config
    from ..engine.decode_files import latent_files, model_of

    files = latent_files(input_dir, pattern)
    found = model_of(files[0])
    config = default_config(found[0] if found else "wan2.2-ti2v-5b")
    _decode_share(config, files, output_dir or input_dir, fps, overwrite)


@decode_light.command()
def light(
    input_dir: Annotated[Path, typer.Option("--input_dir", help="Folder of latents.")],
    output_dir: Annotated[Path | None, typer.Option("--output_dir", help="Folder for the videos; default input_dir.")] = None,
    ckpt_dir: Annotated[Path | None, typer.Option("--ckpt_dir", help="Folder of the checkpoints; default wan_models/Matrix-Game-3.0.")] = None,
    vae_path: Annotated[Path | None, typer.Option("--vae_path", help="Checkpoint, instead of the one in --ckpt_dir.")] = None,
    vae_type: Annotated[str, typer.Option("--vae_type", help="mg_lightvae or mg_lightvae_v2.")] = "mg_lightvae_v2",
    lightvae_pruning_rate: Annotated[float | None, typer.Option("--lightvae_pruning_rate", help="Default: read from the checkpoint.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16 or float32.")] = "bfloat16",
    fps: Fps = 24,
    pattern: Pattern = "*.pt",
    overwrite: Overwrite = False,
) -> None:
    """Decode saved Wan2.2 latents with a LightVAE. Ranks share the files."""
    from ..config import default_config
    from ..core.errors import InputError
    from ..engine.decode_files import latent_files, model_of

    config = default_config("wan2.2-ti2v-5b", [f"inference.vae_type={vae_type}", f"inference.dtype={dtype}"])
    files = latent_files(input_dir, pattern)
    found = model_of(files[0])
    if found and found[0] == "tiny":
        raise InputError(f"{files[0]} holds latents of tiny and a LightVAE decodes Wan2.2's; use scripts/decode_vae_latents.py or `longlive decode`")
    place = {"folder": ckpt_dir, "path": vae_path, "pruning_rate": lightvae_pruning_rate}
    _decode_share(config, files, output_dir or input_dir, fps, overwrite, place)


def _decode_share(config, files: list[Path], output: Path, fps: int, overwrite: bool, place: dict | None = None) -> None:
    """The documented naming, and this rank's share of the files."""
    from ..core.log import launch_rank

    rank, world, _ = launch_rank()
    mine = files[rank::world]
    targets = [output / f"video_{file.stem.removeprefix('latents_')}.mp4" for file in mine]
    decode_all(config, mine, targets, fps, overwrite, place)
