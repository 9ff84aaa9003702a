"""`longlive eval memory`: the same films with and without attention sinks, and what of a character survives its absence."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import split_overrides
from .eval import BatchOption, FilmsOption, JsonOption, ModelOption, SeedOption, TruthOption, _bar, _check, _table, _write


def memory(
    ctx: typer.Context,
    films: FilmsOption = 16,
    seed: SeedOption = 0,
    json: JsonOption = None,
    model: ModelOption = "tiny",
    truth: TruthOption = False,
    batch: BatchOption = 0,
    chunks: Annotated[int, typer.Option("--chunks", help="Length of each film.")] = 16,
    shots: Annotated[int, typer.Option("--shots", help="Shots of each film; the character is away in all but the first and the last.")] = 4,
    split: Annotated[str, typer.Option("--split", help="held-out, or train: combinations of shape and colour that training shows.")] = "held-out",
) -> None:
    """Make films in which a character is told once, goes away and comes back, with and without attention sinks; all scores 0..1.

    identity: the last shot shows the colour and shape that the first caption told, though its own caption names the colour alone; size and
    marking likewise; look: the mean of the three. first_shot: the first shot shows them. colour, setting: told in the last caption. Trailing
    key=value words change the settings.
    """
    from ..config import default_config
    from ..engine.pipeline import Pipeline, choose_device
    from ..evaluation import memory as evaluation
    from ..evaluation.world import generated_chunks, truth_chunks
    from ..world.judge import Judge

    _check("--json", json)
    config = default_config(model, split_overrides(ctx.args))
    stories = evaluation.memory_stories(films, seed, chunks, shots, split)
    configs = {"truth": config} if truth else evaluation.both_ways(config, chunks)
    device = choose_device(config)
    judge = Judge.load(device)
    batch = batch or (8 if device.type == "cuda" else 1)
    runs = {}
    with _bar(len(configs) * films * chunks, "chunks made") as bar:
        for name, used in configs.items():
            made = truth_chunks(stories, device) if truth else generated_chunks(stories, Pipeline.load(used), batch)
            runs[name] = evaluation.read_films(judge, stories, made, on_chunk=bar.advance)
    report = evaluation.compare(runs, seed)
    rows = [(name, *("" if score is None else f"{score:.3f}" for score in scores)) for name, *scores in report.rows()]
    _table(f"{films} {split} films of {chunks} chunks, seed {seed}", ("last shot", *configs, "shuffled"), rows)
    _write(json, report.to_json())
