"""`longlive encode ROOT OUT`: the latents and prompt embeddings of a training set, computed once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .app import OVERRIDES, split_overrides


def register(app: typer.Typer) -> None:
    """Adds the `encode` command."""
    app.command("encode", context_settings=OVERRIDES)(encode)


def encode(
    ctx: typer.Context,
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder with video/ and caption/.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards; train from it with data.load_raw_video=false.")],
    config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="Training configuration that the shards are for; default tiny.")] = None,
    passes: Annotated[int, typer.Option("--passes", min=1, help="Passes over the data whose random starts are encoded.")] = 1,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the training that will read them; default logging.seed.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option("--dtype", help="Precision on disk; bfloat16 is half the size and rounds.")] = "float32",
    shard_mib: Annotated[int, typer.Option("--shard-mib", min=1, help="Size of a file of latents, about.")] = 1024,
    validation: Annotated[bool, typer.Option("--validation", help="Every folder from its first frame, as validation reads it.")] = False,
    no_text: Annotated[bool, typer.Option("--no-text", help="Latents only.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove the shards that OUT holds.")] = False,
) -> None:
    """Encode a training set into shards. Run again to go on where it was stopped; under torchrun each process writes its share.

    A latent depends on every frame before it, so whole streams are encoded, as the samples of the first --passes passes show them. Trailing
    key=value words change settings.
    """
    from ..config import default_config, load_config
    from ..core.log import launch_rank
    from ..data.manifest import index_dataset
    from ..data.open import sample_size, sampling_rules
    from ..data.shard_writer import encode_streams, write_index, written
    from ..data.sources import VideoSource
    from ..engine.naming import check_folder
    from ..models.spec import model_spec
    from .bar import Bar

    overrides = split_overrides(ctx.args)
    settings = load_config(config, overrides) if config is not None else default_config("tiny", overrides)
    check_folder(out, "give a folder that you may write to")
    manifest = index_dataset(root, settings.data.manifest_path)
    rules = sampling_rules(settings, deterministic=validation)
    seed = settings.logging.seed if seed is None else seed
    source = VideoSource(manifest, rules, sample_size(settings), seed=seed, max_broken=settings.data.max_broken_clips)
    if overwrite and launch_rank()[0] == 0:
        for path in written(out):
            path.unlink()
    spec = model_spec(settings.model_kwargs.model_name)
    device = _device(settings)
    codec, codec_is = _codec(settings, spec, device)
    job = _job(settings, out, passes, dtype, shard_mib, manifest.digest, codec_is)
    with Bar("streams encoded") as bar:
        index = encode_streams(job, source, codec, lambda progress: bar.at(progress.streams_done, progress.streams))
    if index is None:
        typer.echo(f"wrote this process's share to {out}; the last process to finish writes the index (if none did, run again)")
        return
    if not no_text:
        index = _with_text(index, out, settings, spec, device)
    write_index(out, index)
    typer.echo(f"wrote {len(index.streams)} streams of {len(source)} folders and {len(index.prompts)} prompts to {out}")


def _device(settings):
    """The configured device; under torchrun the one of this process."""
    import torch

    from ..core.log import launch_rank
    from ..engine.pipeline import choose_device

    device = choose_device(settings)
    return torch.device("cuda", launch_rank()[2]) if device.type == "cuda" and launch_rank()[1] > 1 else device


def _codec(settings, spec, device):
    """The VAE that training encodes with, in its precision, and what identifies it."""
    import torch

    from ..models.light_vae import read_codec
    from ..models.weights import weights_hash
    from ..train.start import training_vae

    mixed = settings.infra.mixed_precision and device.type == "cuda"
    path = training_vae(settings, spec)
    codec = read_codec(path, spec.vae, device=device, dtype=torch.bfloat16 if mixed else torch.float32)
    return codec, {"weights": weights_hash(path), "dtype": str(codec.dtype).removeprefix("torch."), "file": path.name}


def _job(settings, out: Path, passes: int, dtype: str, shard_mib: int, digest: str, codec_is: dict):
    """Files of about `shard_mib` MiB."""
    import math

    import torch

    from ..core.log import launch_rank
    from ..data.shard_writer import ShardJob

    rank, processes, _ = launch_rank()
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    bytes_of_one = math.prod(settings.data.image_or_video_shape[1:]) * kind.itemsize
    return ShardJob(
        out=out,
        passes=passes,
        per_file=max(1, shard_mib * 2**20 // bytes_of_one),
        data=digest,
        codec_is=codec_is,
        dtype=kind,
        workers=settings.data.num_workers,
        rank=rank,
        processes=processes,
    )


def _with_text(index, out: Path, settings, spec, device):
    """The index with its text shards written."""
    from dataclasses import replace

    import torch

    from ..data.shard_writer import encode_texts, prompts_of
    from ..engine.parts import load_text_encoder
    from ..models.weights import weights_hash

    encoder, path = load_text_encoder(spec, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    weights = weights_hash(path) if path is not None else spec.text_kind
    text_is = {"weights": weights, "text_dim": encoder.text_dim, "text_len": encoder.text_len}
    places = encode_texts(out, prompts_of(index), encoder.encode, f"{weights} {encoder.text_len}")
    return replace(index, text=text_is, prompts=places)
