"""Documented commands whose engines come with later versions. They exist so that asking for them says so plainly."""

from __future__ import annotations

import typer

from ..core.errors import NotAvailable

LATER = {
    "serve": ("the server (`longlive serve`)", "use `longlive generate`"),
}

_ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True}


def register(app: typer.Typer) -> None:
    """Adds one command per entry of `LATER`."""
    for name, (feature, remedy) in LATER.items():
        app.command(name, context_settings=_ANYTHING, help="Not available yet.")(_refusal(feature, remedy))


def _refusal(feature: str, remedy: str):
    def command(ctx: typer.Context) -> None:
        raise NotAvailable(feature, remedy)

    return command
