"""The documented entry scripts `train.py`, `inference.py` and `inference_sp.py`: their flags, and the functions that `longlive` itself uses.

Under torchrun every process of `inference.py` takes its own prompts, and groups of processes of `inference_sp.py` share each film (`cli.filming`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InputError
from .app import OVERRIDES, split_overrides
from .scripts import script

train = script("train.py")
inference = script("inference.py")
inference_sp = script("inference_sp.py")

UseTE = Annotated[bool, typer.Option("--use_te_quant", help="NVFP4 with TransformerEngine, whatever the file says.")]
NoTE = Annotated[bool, typer.Option("--no_use_te_quant", help="NVFP4 without TransformerEngine, whatever the file says.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace films that exist.")]


@train.command(context_settings=OVERRIDES)
def train_script(
    ctx: typer.Context,
    config_path: Annotated[Path, typer.Option("--config_path", help="YAML configuration, such as configs/train_ar.yaml.")],
    logdir: Annotated[str, typer.Option("--logdir", help="Where metrics, weights and checkpoints go; empty = here, without resuming.")] = "",
    wandb_save_dir: Annotated[str, typer.Option("--wandb-save-dir", help="Folder for the files of Weights & Biases.")] = "",
    disable_wandb: Annotated[bool, typer.Option("--disable-wandb", help="Do not log to Weights & Biases.")] = False,
    no_save: Annotated[bool, typer.Option("--no_save", help="Write no checkpoint to resume from.")] = False,
    no_visualize: Annotated[bool, typer.Option("--no_visualize", help="No evaluation during training.")] = False,
    no_auto_resume: Annotated[bool, typer.Option("--no-auto-resume", help="Start afresh even where LOGDIR holds a checkpoint.")] = False,
    generate_before_train: Annotated[bool, typer.Option("--generate-before-train", help="Evaluate once and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check configuration and data, estimate memory, take one step; write nothing.")] = False,
) -> None:
    """Train a model. Extra key=value words override the configuration."""
    from ..config import load_config
    from ..core.log import launch_rank
    from ..train import RunOptions, run
    from .train import rehearsal, report_to_stderr

    overrides = split_overrides(ctx.args) + (["evaluation.interval=0"] if no_visualize else [])
    config = load_config(config_path, overrides)
    report_to_stderr()
    if dry_run:
        rehearsal(config)
        return
    options = RunOptions(
        auto_resume=bool(logdir) and not no_auto_resume,
        save=not no_save,
        evaluate_only=generate_before_train,
        wandb=not disable_wandb,
        wandb_dir=Path(wandb_save_dir) if wandb_save_dir else None,
    )
    run(config, Path(logdir), options)
    if launch_rank()[0] == 0:
        typer.echo(f"wrote {Path(logdir).resolve()}")


@inference.command(context_settings=OVERRIDES)
def inference_script(
    ctx: typer.Context,
    config_path: Annotated[Path, typer.Option("--config_path", help="YAML configuration.")] = Path("configs/inference.yaml"),
    use_te_quant: UseTE = False,
    no_use_te_quant: NoTE = False,
    overwrite: Overwrite = False,
) -> None:
    """Generate a film for every prompt of data.data_path. Extra key=value words override the configuration."""
    config = _inference_config(config_path, split_overrides(ctx.args), use_te_quant, no_use_te_quant)
    if config.sp_size * config.dp_size > 1:
        raise InputError(f"sp_size({config.sp_size}) x dp_size({config.dp_size}) > 1 belongs to inference_sp.py; set both to 1, or use that script")
    _generate(config, overwrite)


@inference_sp.command(context_settings=OVERRIDES)
def inference_sp_script(
    ctx: typer.Context,
    config_path: Annotated[Path, typer.Option("--config_path", help="YAML configuration.")],
    use_te_quant: UseTE = False,
    no_use_te_quant: NoTE = False,
    overwrite: Overwrite = False,
) -> None:
    """Generate films, each by several GPUs together. Extra key=value words override the configuration."""
    from .filming import group_sizes_of

    config = _inference_config(config_path, split_overrides(ctx.args), use_te_quant, no_use_te_quant)
    group_sizes_of(config)
    _generate(config, overwrite)


def _inference_config(path: Path, overrides: list[str], use_te: bool, no_te: bool):
    """The configuration of an inference script, refused before anything is read when it cannot be served."""
    from ..config import availability, load_config

    if use_te and no_te:
        raise InputError("--use_te_quant and --no_use_te_quant exclude each other; give one of them")
    if use_te or no_te:
        overrides = [*overrides, f"model_quant_use_transformer_engine={'true' if use_te else 'false'}"]
    config = load_config(path, overrides)
    if use_te and not config.infra.model_quant:
        raise InputError(f"--use_te_quant chooses how model_quant works, and {path} has model_quant: false; set model_quant: true or drop the flag")
    availability(config, "generate")
    return config


def _generate(config, overwrite: bool) -> None:
    from ..engine.sources import boards_for_inference
    from .filming import make_films

    make_films(config, boards_for_inference(config), Path(config.output_folder), overwrite=overwrite)
