"""`longlive bench`: figures of speed and memory, each with the hardware, versions and span it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the record here, after every case.")]
TileRows = Annotated[int, typer.Option("--vae-tile-rows", min=0, help="Decode a latent frame at a time, at the end in tiles of so many latent rows; 0: no.")]


def register(app: typer.Typer) -> None:
    """Adds the `bench` group."""
    group = typer.Typer(help="Measure speed and memory.", no_args_is_help=True)
    ops = typer.Typer(help="Single operations.", no_args_is_help=True)
    group.command("train")(train)
    group.command("distil")(distil)
    group.command("generate")(generate)
    group.command("precision")(precision)
    ops.command("attention")(attention)
    ops.command("fused")(fused)
    ops.command("vae")(vae)
    group.add_typer(ops, name="ops")
    app.add_typer(group, name="bench")


def train(
    model: Annotated[str, typer.Option("--model", help="Whose sizes; weights are random.")] = "wan2.2-ti2v-5b",
    frames: Annotated[str, typer.Option("--frames", help="Latent frames, with commas.")] = "96,192,384",
    layouts: Annotated[str, typer.Option("--layouts", help="none, contiguous, balanced; with commas. Default: all, or none for one process.")] = "",
    layers: Annotated[int | None, typer.Option("--layers", help="Blocks of the network; default: all.")] = None,
    fallback_layers: Annotated[int | None, typer.Option("--fallback-layers", help="Try a case that runs out of memory again with so many, at last.")] = None,
    steps: Annotated[int, typer.Option("--steps", help="Timed steps of a case.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps before them.")] = 1,
    case_seconds: Annotated[float, typer.Option("--case-seconds", help="A case takes no further step after so many timed seconds.")] = 60.0,
    seconds: Annotated[float, typer.Option("--seconds", help="No case begins later.")] = 540.0,
    window: Annotated[int | None, typer.Option("--window", help="Visible chunks, the own one included; default: the whole history.")] = None,
    fsdp: Annotated[str, typer.Option("--fsdp", help="full, hybrid_full, hybrid_zero2 or no_shard.")] = "full",
    recompute: Annotated[str, typer.Option("--recompute", help="Activations in the backward: none, or those of blocks.")] = "blocks",
    keep_reads: Annotated[int | None, typer.Option("--keep-reads", help="Recomputed blocks that do not attend again; default: all.")] = None,
    keep_blocks: Annotated[int, typer.Option("--keep-blocks", help="The last so many blocks are not recomputed.")] = 0,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the blocks.")] = False,
    precision: Annotated[str, typer.Option("--precision", help="Products of linear layers: bf16, fp8 or nvfp4 (emulated but for the formats).")] = "bf16",
    profile: Annotated[bool, typer.Option(help="One more step per case: where the kernels' time goes.")] = True,
    json: JsonOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out cases that FILE has already.")] = False,
) -> None:
    """Seconds per training step of the generator, utilisation and peak memory, alone or under torchrun (`torchrun ... -m longlive bench train`)."""
    from ..bench.train import LAYOUTS, NONE, TrainSettings, bench_train
    from ..core.errors import InputError
    from ..core.log import launch_rank

    _check(json)
    if resume and json is None:
        raise InputError("--resume goes on with a record; give it with --json FILE")
    chosen = _words(layouts) or (LAYOUTS if launch_rank()[1] > 1 else (NONE,))
    settings = TrainSettings(
        model=model, frames=_numbers("--frames", frames), layouts=chosen, layers=layers, fallback_layers=fallback_layers, steps=steps, warmup=warmup,
        case_seconds=case_seconds, seconds=seconds, window=window, fsdp=fsdp, recompute=recompute, keep_reads=keep_reads, keep_blocks=keep_blocks,
        compile=compile, precision=precision, profile=profile,
    )  # fmt: skip
    bench_train(settings, json, _say, resume=resume)
    if json is not None and launch_rank()[0] == 0:
        typer.echo(f"wrote {json}")


def distil(
    config: Annotated[Path, typer.Option("--config", help="A configuration of the distillation trainer; its checkpoints and data are not read.")] = Path(
        "configs/train_dmd.yaml"
    ),
    override: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Changes a key of the configuration; may be repeated.")] = [],
    steps: Annotated[int, typer.Option("--steps", help="Timed steps of each player.")] = 3,
    warmup: Annotated[int, typer.Option("--warmup", help="Steps before them.")] = 1,
    layers: Annotated[int | None, typer.Option("--layers", help="Blocks of the network; default: all.")] = None,
    json: JsonOption = None,
) -> None:
    """Seconds and peak memory of a student's and a critic's step, alone or under torchrun; weights and words are random."""
    from ..bench.distil import DistilSettings, bench_distil
    from ..core.log import launch_rank

    _check(json)
    bench_distil(DistilSettings(config=config, overrides=tuple(override), steps=steps, warmup=warmup, layers=layers), json, _say)
    if json is not None and launch_rank()[0] == 0:
        typer.echo(f"wrote {json}")


def generate(
    model: Annotated[str, typer.Option("--model", help="Whose sizes; weights are random.")] = "wan2.2-ti2v-5b",
    config: Annotated[Path | None, typer.Option("--config", help="A configuration with checkpoints, instead of random weights.")] = None,
    override: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Changes a key of the configuration; may be repeated.")] = [],
    precision: Annotated[str, typer.Option("--precision", help="Number formats of the generator, with commas.")] = "bf16",
    steps: Annotated[str, typer.Option("--steps", help="Sampling steps, with commas.")] = "4,2",
    vae: Annotated[str, typer.Option("--vae", help="wan, lightvae_v1, lightvae_v2, with +fp8 if so, or none (sampling alone); with commas.")] = "wan",
    chunks: Annotated[int, typer.Option("--chunks", help="Steady chunks that are timed.")] = 16,
    height: Annotated[int | None, typer.Option("--height", help="Pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels; default: the model's.")] = None,
    window: Annotated[int, typer.Option("--window", help="Latent frames that attention sees (random weights).")] = 32,
    decode: Annotated[str, typer.Option("--decode", help="How frames are decoded: inline, same-stream or side-stream.")] = "side-stream",
    group: Annotated[int, typer.Option("--group", help="Latent frames per call of the decoder; 0: the codec's own choice.")] = 0,
    tile_rows: TileRows = 0,
    layers: Annotated[int | None, typer.Option("--layers", help="Blocks of the generator (random weights); default: all.")] = None,
    graphs: Annotated[str, typer.Option("--graphs", help="Record forwards as CUDA graphs: auto, on, off.")] = "auto",
    attention: Annotated[str, typer.Option("--attention", help="Self-attention: auto, fp8, hopper, ordered, sdpa, math.")] = "auto",
    profile: Annotated[bool, typer.Option("--profile", help="Where the kernels' time goes, for a chunk of sampling and of decoding.")] = False,
    seconds: Annotated[float, typer.Option("--seconds", help="No measurement begins later.")] = 540.0,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="Two settings in turn, such as steps=4 steps=2 (precision, steps, vae, group, graphs, attention)."),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Where the rows go; default: a new file in benchmarks/results.")] = None,
) -> None:
    """Frames per second of generation: sampling, decoding and both; time to the first frames, evenness of chunks, peak memory.

    Under torchrun all processes make each film together (`torchrun ... -m longlive bench generate`).
    """
    import torch

    from ..bench.generate import GenerateSettings, bench_generate, results_file
    from ..core.log import launch_rank
    from ..parallel.film_groups import film_mesh

    path = json or results_file("generate")
    _check(path)
    settings = GenerateSettings(
        model=model, config=config, overrides=tuple(override), precisions=_words(precision), steps=_numbers("--steps", steps), vaes=_words(vae), chunks=chunks,
        height=height, width=width, window=window, decode=decode, group=group, tile_rows=tile_rows, layers=layers, graphs=graphs,
        attention=attention, profile=profile, seconds=seconds,
    )  # fmt: skip
    rank, world, _ = launch_rank()
    with film_mesh([world], "cuda" if torch.cuda.is_available() else "cpu") as mesh:
        bench_generate(settings, path, _say, compare=compare, mesh=mesh)
    if rank == 0:
        typer.echo(f"wrote {path}")


def precision(
    model: Annotated[str, typer.Option("--model", help="Whose sizes; weights are random.")] = "wan2.2-ti2v-5b",
    ways: Annotated[str, typer.Option("--ways", help="Precisions of the linear layers, with commas; bf16 among them.")] = "bf16,fp8,w4a8,w4a16,emulated",
    stores: Annotated[str, typer.Option("--stores", help="Formats of cached keys and values, with commas; bf16 among them.")] = "bf16,fp8,int8,nvfp4",
    layers: Annotated[int | None, typer.Option("--layers", help="Blocks of the generator; default: all.")] = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels; default: the model's.")] = None,
    window: Annotated[int, typer.Option("--window", help="Chunks that attention sees, the own one included.")] = 4,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed forwards of each way.")] = 5,
    exact: Annotated[bool, typer.Option(help="Errors against float32 too.")] = True,
    parts: Annotated[bool, typer.Option("--parts", help="Also the error of each kind of layer alone.")] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Where the record goes; default: a new file in benchmarks/results.")] = None,
) -> None:
    """Number formats of linear layers and of cached keys and values against bf16: forward time, memory, error, in one run."""
    from ..bench.generate import results_file
    from ..bench.precision import PrecisionSettings, bench_precision

    path = json or results_file("precision")
    _check(path)
    settings = PrecisionSettings(
        model=model, ways=_words(ways), stores=_words(stores), layers=layers, height=height, width=width, window=window, repeats=repeats, exact=exact,
        parts=parts,
    )  # fmt: skip
    bench_precision(settings, path, _say)
    typer.echo(f"wrote {path}")


def attention(
    chunks: Annotated[str, typer.Option("--chunks", help="Lengths of the film, with commas.")] = "12,24",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a chunk.")] = 7040,
    heads: Annotated[int, typer.Option("--heads", help="Attention heads.")] = 24,
    head_dim: Annotated[int, typer.Option("--head-dim", help="Features of a head.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed calls of each way.")] = 5,
    ways: Annotated[str, typer.Option("--ways", help="merged, plain, flex; with commas.")] = "merged,plain,flex",
    autotune: Annotated[bool, typer.Option("--autotune", help="Let the compiler try FlexAttention's variants (minutes).")] = False,
    json: JsonOption = None,
) -> None:
    """Teacher-forced self-attention alone: our dense calls against FlexAttention, in turn, forward and with the backward."""
    from ..bench.attention import AttentionSettings, bench_attention

    _check(json)
    settings = AttentionSettings(
        chunks=_numbers("--chunks", chunks), chunk_tokens=tokens, heads=heads, head_dim=head_dim, repeats=repeats, ways=_words(ways), autotune=autotune
    )
    bench_attention(settings, json, _say)
    if json is not None:
        typer.echo(f"wrote {json}")


def fused(
    model: Annotated[str, typer.Option("--model", help="Whose sizes.")] = "wan2.2-ti2v-5b",
    height: Annotated[int | None, typer.Option("--height", help="Pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels; default: the model's.")] = None,
    window: Annotated[int, typer.Option("--window", help="Latent frames that self-attention reads.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed calls.")] = 20,
    json: JsonOption = None,
) -> None:
    """Every operation of a transformer block: its time, its floor, its torch reference."""
    from ..bench.fused import FusedSettings, bench_fused

    _check(json)
    bench_fused(FusedSettings(model=model, height=height, width=width, window=window, repeats=repeats), json, _say)
    if json is not None:
        typer.echo(f"wrote {json}")


def vae(
    model: Annotated[str, typer.Option("--model", help="Whose sizes.")] = "wan2.2-ti2v-5b",
    vae: Annotated[str, typer.Option("--vae", help="wan, lightvae_v1, lightvae_v2, with +fp8 if so; with commas.")] = "wan",
    groups: Annotated[str, typer.Option("--groups", help="Latent frames per call of the decoder, with commas; 0: its own choice.")] = "0",
    height: Annotated[int | None, typer.Option("--height", help="Pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels; default: the model's.")] = None,
    tile_rows: TileRows = 0,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed chunks.")] = 5,
    json: JsonOption = None,
) -> None:
    """Decoding a chunk: every convolution by its shape, norms and the rest, each with its floor."""
    from ..bench.vae import VaeSettings, bench_vae

    _check(json)
    sizes = {"height": height, "width": width, "tile_rows": tile_rows, "repeats": repeats}
    bench_vae(VaeSettings(model=model, vaes=_words(vae), groups=_numbers("--groups", groups), **sizes), json, _say)
    if json is not None:
        typer.echo(f"wrote {json}")


def _say(line: str) -> None:
    typer.echo(line)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from ..core.errors import InputError

    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise InputError(f"{option} {text!r}: whole numbers with commas between them, such as 96,192")
    return tuple(map(int, words))


def _check(path: Path | None) -> None:
    """Refuses a place that cannot be written to before anything is measured."""
    from ..core.errors import InputError
    from ..engine.naming import check_folder

    if path is None:
        return
    if path.is_dir():
        raise InputError(f"--json {path} is a folder; give the file to write, such as {path / 'bench.json'}")
    check_folder(path.parent, "give --json a file in a folder that you may write to")
