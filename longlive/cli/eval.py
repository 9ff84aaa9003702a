"""`longlive eval world|drift|memory`: films of storyboards drawn from a seed, and what the judge sees in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import OVERRIDES, split_overrides

FilmsOption = Annotated[int, typer.Option("--films", help="How many films.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Draws the storyboards, and nothing else does.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here.")]
ModelOption = Annotated[str, typer.Option("--model", help="tiny.")]
TruthOption = Annotated[bool, typer.Option("--truth", help="Judge renders of the truth instead of films: the judge's own calibration.")]
BatchOption = Annotated[int, typer.Option("--batch", help="Films made together; 0: 8 on a GPU, 1 on a CPU.")]


def register(app: typer.Typer) -> None:
    """Adds the `eval` group."""
    from .eval_memory import memory

    group = typer.Typer(help="Scores of generated films.", no_args_is_help=True)
    group.command("world", context_settings=OVERRIDES)(world)
    group.command("drift", context_settings=OVERRIDES)(drift)
    group.command("memory", context_settings=OVERRIDES)(memory)
    app.add_typer(group, name="eval")


def world(
    ctx: typer.Context,
    films: FilmsOption = 30,
    seed: SeedOption = 0,
    json: JsonOption = None,
    model: ModelOption = "tiny",
    truth: TruthOption = False,
    reconstruct: Annotated[bool, typer.Option("--reconstruct", help="Judge renders that went through the VAE.")] = False,
    blur: Annotated[float, typer.Option("--blur", metavar="SIGMA", help="Blur these renders first: a Gaussian, in pixels at 192x320.")] = 0.0,
    noise: Annotated[float, typer.Option("--noise", metavar="STD", help="Add noise to these renders: its standard deviation in levels of 255.")] = 0.0,
    batch: BatchOption = 0,
    chunks: Annotated[int, typer.Option("--chunks", help="Length of each film.")] = 6,
    shots: Annotated[int, typer.Option("--shots", help="Shots of each film.")] = 3,
) -> None:
    """Make films of held-out stories and score them: colour, shape, setting, action, camera, identity, cuts, each 0..1.

    The last column is what the same films score against each other's storyboards. Trailing key=value words change the settings.
    """
    from ..config import default_config
    from ..core.errors import InputError
    from ..engine.pipeline import Pipeline, choose_device
    from ..evaluation import world as evaluation
    from ..evaluation.degrade import Degradation, degraded_chunks
    from ..world.judge import Judge

    _check("--json", json)
    worse = Degradation(blur=blur, noise=noise)
    if worse and not (truth or reconstruct):
        raise InputError("--blur and --noise test the judge on renders, not the model's films; add --truth or --reconstruct")
    config = default_config(model, split_overrides(ctx.args))
    stories = evaluation.evaluation_stories(films, seed, chunks, shots)
    device = choose_device(config)
    judge = Judge.load(device)
    batch = batch or (8 if device.type == "cuda" else 1)
    if truth:
        source, made = "truth", evaluation.truth_chunks(stories, device)
    elif reconstruct:
        source, made = "reconstructed", evaluation.reconstructed_chunks(stories, _codec(config, device))
    else:
        source, made = "generated", evaluation.generated_chunks(stories, Pipeline.load(config), batch)
    if worse:
        source, made = f"{source} (blur {blur:g}, noise {noise:g})", degraded_chunks(stories, made, worse)
    with _bar(films, "films judged") as bar:
        films_made = evaluation.whole_films(stories, made)
        report = evaluation.judge_films(judge, stories, films_made, seed=seed, source=source, on_film=lambda film: bar.advance())
    rows = [(name, f"{score:.3f}", "" if chance is None else f"{chance:.3f}") for name, score, chance in evaluation.report_rows(report)]
    _table(f"{films} {source} films, seed {seed}", ("attribute", "score", "shuffled"), rows)
    for name, row in report.calibration.items():
        sure = f"certainty {row['certainty']:.3f}, right {row['right']:.3f}, calibration error {row['error']:.3f}"
        typer.echo(f"{name} of {row['characters']} characters: {sure}")
    _write(json, report.to_json())


def drift(
    ctx: typer.Context,
    films: FilmsOption = 1,
    seed: SeedOption = 0,
    json: JsonOption = None,
    model: ModelOption = "tiny",
    truth: TruthOption = False,
    batch: BatchOption = 0,
    chunks: Annotated[int, typer.Option("--chunks", help="Length of each film; 450 chunks are 10 minutes.")] = 90,
    shot_chunks: Annotated[int, typer.Option("--shot-chunks", help="Mean length of a shot in chunks.")] = 6,
    window: Annotated[float, typer.Option("--window", help="Seconds per row.")] = 20.0,
    every: Annotated[int, typer.Option("--every", help="Read only each n-th chunk.")] = 1,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the curves here.")] = None,
) -> None:
    """Scores over the length of long films, chunk by chunk, at constant memory.

    What is shown: 0 to 1. How it looks, but for tone: 1.0 is as the truth. docs/world.md says what each figure means.
    """
    from ..config import default_config
    from ..core.errors import InputError
    from ..engine.pipeline import Pipeline, choose_device
    from ..evaluation import world as evaluation
    from ..evaluation.drift import LOOKS, SHOWN, DriftMeter, curve, losses
    from ..evaluation.drift_plot import plot_curves
    from ..world.judge import Judge

    _check("--json", json)
    _check("--plot", plot)
    config = default_config(model, split_overrides(ctx.args))
    if shot_chunks < 1:
        raise InputError(f"--shot-chunks {shot_chunks}: a shot lasts at least one chunk")
    stories = evaluation.evaluation_stories(films, seed, chunks, max(evaluation.SHOTS, chunks // shot_chunks))
    device = choose_device(config)
    judge = Judge.load(device)
    meters = [DriftMeter(judge=judge, story=story, window=window, every=every) for story in stories]
    batch = batch or (8 if device.type == "cuda" else 1)
    made = evaluation.truth_chunks(stories, device) if truth else evaluation.generated_chunks(stories, Pipeline.load(config), batch)
    with _bar(films * chunks, "chunks judged") as bar:
        for index, frames in made:
            meters[index].feed(frames)
            bar.advance()
    rows = curve(meters)
    source = "truth" if truth else "generated"
    for title, names in (("what is shown", SHOWN), ("how it looks", LOOKS)):
        cells = [(f"{row['from_second']:.0f}", f"{row['chunks']:.0f}", *("-" if row[n] is None else f"{row[n]:.3f}" for n in names)) for row in rows]
        _table(f"{films} {source} films of {chunks} chunks, seed {seed}: {title}", ("from second", "chunks", *names), cells)
    changes = losses(rows)
    for change in changes:
        typer.echo(f"{change['name']:>10}  {change['first']:.3f} -> {change['last']:.3f}, {change['lost']:.1f} points lost")
    if plot is not None:
        typer.echo(f"wrote {plot_curves(rows, plot)}")
    _write(json, {"films": films, "seed": seed, "chunks": chunks, "source": source, "curve": rows, "losses": changes})


def _codec(config, device):
    from ..engine.parts import load_codec
    from ..models.spec import model_spec

    return load_codec(config, model_spec(config.model_kwargs.model_name), device)[0]


class _bar:
    """A progress bar on stderr."""

    def __init__(self, total: int, label: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.task = self.progress.add_task(label, total=total)

    def __enter__(self) -> "_bar":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def advance(self) -> None:
        self.progress.advance(self.task)


def _table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _check(option: str, path: Path | None) -> None:
    """Refuses a place that cannot be written to before the films are made."""
    from ..core.errors import InputError
    from ..engine.naming import check_folder

    if path is None:
        return
    ending = ".json" if option == "--json" else ".png"
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; give the file to write, such as {path / ('scores' + ending)}")
    if ending == ".png" and path.suffix.lower() != ending:
        raise InputError(f"{option} {path} must end in .png")
    check_folder(path.parent, f"give {option} a file in a folder that you may write to")


def _write(path: Path | None, values: dict) -> None:
    from ..engine.json_file import write_json

    if path is None:
        return
    write_json(path, values)
    typer.echo(f"wrote {path}")
