"""`longlive config show|check|schema`: what a run would use, where each value came from, and whether it can work."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..config import default_config, load_config
from ..config.show import config_schema, config_table, config_yaml, schema_table
from .app import OVERRIDES, split_overrides

group = typer.Typer(no_args_is_help=True, help="Show, check and explain configurations.")

File = Annotated[str | None, typer.Argument(help="YAML file; without one, the released settings of --model.")]
Model = Annotated[str, typer.Option(help="Model whose settings are used when no file is given.")]


def register(app: typer.Typer) -> None:
    """Adds the `config` group to the application."""
    app.add_typer(group, name="config")


def _load(file: str | None, model: str, args: list[str]):
    if file is not None and "=" in file:
        file, args = None, [file, *args]
    overrides = split_overrides(args)
    return load_config(file, overrides) if file else default_config(model, overrides)


@group.command(context_settings=OVERRIDES)
def show(
    ctx: typer.Context,
    file: File = None,
    model: Model = "tiny",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON without provenance.")] = False,
    changed: Annotated[bool, typer.Option("--changed", help="Leave out keys that have their default.")] = False,
) -> None:
    """Print the resolved configuration, each value with where it came from."""
    config = _load(file, model, ctx.args)
    if as_json:
        typer.echo(json.dumps(config_table(config, changed=changed), indent=2, ensure_ascii=False))
    else:
        typer.echo(config_yaml(config, changed=changed), nl=False)


@group.command(context_settings=OVERRIDES)
def check(ctx: typer.Context, file: File = None, model: Model = "tiny") -> None:
    """Print ok, or one line that says what is wrong (exit code 2)."""
    config = _load(file, model, ctx.args)
    typer.echo(f"ok: {config.source or f'the settings of {config.model_kwargs.model_name}'}")


@group.command()
def schema(as_json: Annotated[bool, typer.Option("--json", help="Print JSON Schema.")] = False) -> None:
    """List every key with its type, default and meaning."""
    typer.echo(json.dumps(config_schema(), indent=2, ensure_ascii=False) if as_json else schema_table(), nl=as_json)
