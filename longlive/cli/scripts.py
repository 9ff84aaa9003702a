"""The documented scripts.

Each is a typer application of one command, run by a file in scripts/ of the same name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..config import load_config
from ..core.errors import InputError
from .app import run


def script(name: str) -> typer.Typer:
    """An application for one command, as the entry scripts use it."""
    return typer.Typer(name=name, add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


ConfigPath = Annotated[Path, typer.Option("--config_path", help="YAML configuration.")]
OutputPath = Annotated[Path, typer.Option("--output_path", help="Checkpoint to write.")]
Generator = Annotated[str | None, typer.Option("--generator_ckpt", help="Instead of checkpoints.generator_ckpt.")]
Lora = Annotated[str | None, typer.Option("--lora_ckpt", help="Instead of checkpoints.lora_ckpt.")]
MergeDevice = Annotated[str | None, typer.Option("--device", help="Device to work on, cpu or cuda:N; default cuda:0 where there is a GPU, else cpu.")]
Dtype = Annotated[str, typer.Option("--dtype", help="bf16 or fp32.")]

merge_lora = script("merge_lora_generator")
save_nvfp4 = script("save_merged_nvfp4_generator")
halo_windows = script("compute_sp_vae_chunk_halo")


def _dtype(word: str):
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[word]


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} {value!r} is none of {', '.join(allowed)}")


@merge_lora.command()
def merge(
    config_path: ConfigPath,
    output_path: OutputPath,
    generator_ckpt: Generator = None,
    lora_ckpt: Lora = None,
    device: MergeDevice = None,
    dtype: Dtype = "bf16",
) -> None:
    """Merge a base generator and a LoRA into one checkpoint: a published .pt container, or .safetensors by the ending of --output_path.

    Each merged weight is W + weight x alpha / rank x B A, added in float32 and rounded once. The file says so: no LoRA is ever applied to it again.
    """
    from ..engine.export_merged import merge_checkpoint

    _choice("--dtype", dtype, ("bf16", "fp32"))
    config = load_config(config_path, _with_adapter(config_path, _checkpoints(generator_ckpt, lora_ckpt)))
    about = merge_checkpoint(config, output_path, dtype=_dtype(dtype), device=_place(device))
    typer.echo(f"wrote {output_path} ({about['generator_ckpt']} with {about['lora_ckpt']} merged in, {about['dtype']})")
    typer.echo("use it as checkpoints.generator_ckpt, and remove lora_ckpt and the adapter section")


def _with_adapter(config_path: Path, overrides: list[str]) -> list[str]:
    """The overrides, and an adapter section where the file has none: a merge needs no more than the two checkpoints."""
    from ..config.yaml_io import read_yaml

    return overrides if read_yaml(config_path).get("adapter") is not None else [*overrides, "adapter={}"]


@save_nvfp4.command()
def save(
    config_path: ConfigPath,
    output_path: OutputPath,
    backend: Annotated[str, typer.Option("--backend", help="fouroversix (packed weights) or transformer_engine (merged bf16).")] = "fouroversix",
    generator_ckpt: Generator = None,
    lora_ckpt: Lora = None,
    no_merge_lora: Annotated[bool, typer.Option("--no_merge_lora", help="Leave the LoRA out.")] = False,
    device: MergeDevice = None,
    dtype: Dtype = "bf16",
) -> None:
    """Save a merged generator for NVFP4 inference: packed weights, or merged bf16 ones that are quantised when they are loaded.

    --output_path ends with .pt (the published container) or .safetensors (ours, which describes itself).
    """
    from ..engine.export_quantised import EXPORTS, export_quantised

    _choice("--backend", backend, EXPORTS)
    _choice("--dtype", dtype, ("bf16", "fp32"))
    overrides = _checkpoints(generator_ckpt, lora_ckpt)
    config = load_config(config_path, _with_adapter(config_path, overrides) if lora_ckpt else overrides)
    how = {"backend": backend, "dtype": _dtype(dtype), "device": _place(device), "merge_lora": not no_merge_lora}
    about = export_quantised(config, output_path, **how)
    typer.echo(f"wrote {output_path} ({about['generator_ckpt']}{_and_lora(about)}, {about['checkpoint_format']})")
    engine = str(backend == "transformer_engine").lower()
    typer.echo(f"use it as checkpoints.generator_ckpt with model_quant: true, model_quant_use_transformer_engine: {engine} and merge_lora: false")


def _checkpoints(generator_ckpt: str | None, lora_ckpt: str | None) -> list[str]:
    return [f"checkpoints.{key}={json.dumps(path)}" for key, path in (("generator_ckpt", generator_ckpt), ("lora_ckpt", lora_ckpt)) if path]


def _and_lora(about: dict) -> str:
    return f" with {about['lora_ckpt']} merged in" if about["lora_ckpt"] else ""


def _place(device: str | None):
    """The device that a script works on; by default the first GPU, else the CPU."""
    import torch

    from ..engine.pipeline import named_device, present

    return present(named_device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"), "--device"), "--device")


@halo_windows.command()
def windows(
    config_path: Annotated[Path, typer.Option("--config", help="YAML training configuration.")],
    sp_size: Annotated[int | None, typer.Option("--sp-size", help="Instead of infra.sequence_parallel_size.")] = None,
    halo_latents: Annotated[int | None, typer.Option("--halo-latents", help="Instead of infra.vae_halo_latents.")] = None,
    latent_frames: Annotated[int | None, typer.Option("--latent-frames", help="Instead of data.image_or_video_shape[1].")] = None,
    raw_frames: Annotated[int | None, typer.Option("--raw-frames", help="Pixel frames of the clip, where it ends early.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which frames each rank encodes in sequence-parallel training."""
    from ..core.geometry import pixel_frames
    from ..parallel.halo import halo_windows as plan

    config = load_config(config_path)
    ranks = config.infra.sequence_parallel_size if sp_size is None else sp_size
    halo = config.infra.vae_halo_latents if halo_latents is None else halo_latents
    latents = config.data.image_or_video_shape[1] if latent_frames is None else latent_frames
    table = [window.row() for window in plan(latents, ranks, halo, raw_frames)]
    exact = _exact_halo(config.model_kwargs.model_name)
    if as_json:
        sizes = {"latent_frames": latents, "sp_size": ranks, "halo_latents": halo, "exact_halo_latents": exact}
        typer.echo(json.dumps({**sizes, "raw_frames": pixel_frames(latents) if raw_frames is None else raw_frames, "rank_metas": table}, indent=2))
        return
    typer.echo(f"{latents} latent frames on {ranks} ranks, halo {halo} latents ({exact} is exact)")
    typer.echo("rank  keeps latents  halo from  pixel frames   count  drops latents")
    for w in table:
        keeps, raw = f"[{w['keep_start']}, {w['keep_end']})", f"[{w['raw_start']}, {w['raw_end']})"
        typer.echo(f"{w['sp_rank']:4d}  {keeps:13s}  {w['halo_start']:9d}  {raw:13s}  {w['raw_frames']:5d}  {w['drop_latents']:13d}")


def _exact_halo(model_name: str) -> int:
    """Latents of halo after which nothing of a window's start is left, from the layers of the model's VAE."""
    import torch

    from ..models.spec import model_spec
    from ..models.vae_reach import exact_halo
    from ..models.wan_vae import WanVAE

    with torch.device("meta"):
        return exact_halo(WanVAE(model_spec(model_name).vae).encoder)


def main(application: typer.Typer) -> None:
    """Runs one script and exits with its code."""
    raise SystemExit(run(application))
