"""The `longlive` command: one file per command group, registered here.

A command file is `longlive/cli/<group>.py` with a function `register(app)`, and its name is a line in `GROUPS`. It imports nothing heavy at
its top: torch and the engine belong inside the functions, so that `longlive --help` answers in a second.

Trailing `key=value` words of a command are configuration overrides: declare the command with `context_settings=OVERRIDES`, take
`ctx: typer.Context` and pass `split_overrides(ctx.args)` on. Errors reach the user as one line on stderr; see `main` for exit codes.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from .. import __version__
from ..core.errors import InputError, LongLiveError

GROUPS = ("generate", "storyboard", "decode", "train", "data", "encode", "export", "demo", "world", "eval", "parity", "bench", "doctor", "config", "later")

# typer carries its own copy of click in some versions; its public exceptions lead to the right base class in all of them
_ClickException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": False}

app = typer.Typer(
    name="longlive",
    help="Long, multi-shot video generation, chunk by chunk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def split_overrides(args: list[str]) -> list[str]:
    """The `key=value` words among the extra arguments of a command. Raises InputError for anything else."""
    for word in args:
        if "=" not in word or word.startswith("-"):
            raise InputError(f"unexpected argument {word!r}; overrides are written key=value, such as inference.sampling_steps=2")
    return list(args)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"longlive {__version__}")
        raise typer.Exit()


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False) -> None:
    pass


for _group in GROUPS:
    importlib.import_module(f".{_group}", __package__).register(app)


def run(command: typer.Typer, args: list[str] | None = None) -> int:
    """Runs a typer application and returns its exit code: 0 done, 1 a check failed, 2 bad input, 130 interrupted.

    Errors that users meet are printed on stderr as one line; any other exception is a defect and keeps its traceback.
    """
    try:
        code = typer.main.get_command(command).main(args=args, standalone_mode=False)
        if code == 130:  # what some versions of typer make of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except LongLiveError as error:
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("interrupted", err=True)
        return 130
    except _ClickException as error:
        message = error.format_message()
        if message:  # without one, click has printed the help page
            typer.echo(f"error: {message.rstrip('.')}; see --help", err=True)
        return 2


def main() -> None:
    """Entry point of the `longlive` command."""
    sys.exit(run(app))
