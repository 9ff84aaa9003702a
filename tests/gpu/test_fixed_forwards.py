"""Recorded forwards on a GPU give the film of plain ones, through cuts, other prompts, snapshots and adapters."""

from types import SimpleNamespace

import pytest
import torch
from test_transformer import COLUMNS, CUTS, DIMS, FRAMES, PROMPTS, ROWS, apart, model

from longlive.engine.rollout import Rollout, RolloutSettings, chunk_noise
from longlive.models.joint import join_projections
from longlive.models.lora import attach, branches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def rollout(dit, fixed, **settings):
    options = {"chunk_frames": FRAMES, "window_frames": 3 * FRAMES, "sink_frames": FRAMES} | settings
    sizes = {"token_height": ROWS, "token_width": COLUMNS, "batch": 2, "device": "cuda", "dtype": torch.bfloat16}
    return Rollout(dit, RolloutSettings(**options), fixed=fixed, **sizes)


def step(film, dit, chunk, text):
    noise = torch.stack([chunk_noise(0, b, 0, chunk, (FRAMES, DIMS.channels, 2 * ROWS, 2 * COLUMNS)) for b in range(2)])
    return film.step(noise, text, [0, 2], [cuts[chunk % len(cuts)] for cuts in CUTS], negative=1)


@pytest.mark.parametrize("settings", [{}, {"recache": True}, {"relative": True}, {"guidance": 3.0, "batched_guidance": False}], ids=str)
def test_a_recorded_film_is_the_film(settings):
    dit = model("cuda", torch.bfloat16).requires_grad_(False)
    join_projections(dit)
    with torch.no_grad():
        texts = [dit.text(PROMPTS), dit.text([p.flip(0) for p in PROMPTS])]
    films = [rollout(dit, fixed, **settings) for fixed in (False, True)]
    for chunk in range(10):
        plain, fixed = (step(film, dit, chunk, texts[chunk >= 6]) for film in films)
        assert apart(fixed, plain) < 0.02, chunk  # other text widths round otherwise
    assert sum(f.graph is not None for f in films[1].fixed.forwards.values()) >= 4


def begun(chunks):
    """A network, its text, and a recorded film of so many chunks."""
    dit = model("cuda", torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        text = dit.text(PROMPTS)
    film = rollout(dit, True)
    for chunk in range(chunks):
        step(film, dit, chunk, text)
    return dit, text, film


def test_a_recorded_film_goes_on_from_a_snapshot():
    dit, text, film = begun(5)
    kept = film.snapshot()
    first = [step(film, dit, chunk, text) for chunk in range(5, 8)]
    film.restore(kept)
    assert all(torch.equal(a, step(film, dit, chunk, text)) for a, chunk in zip(first, range(5, 8)))


def test_adapters_are_heard():
    dit, text, film = begun(6)
    kept = film.snapshot()
    plain = step(film, dit, 6, text)
    attach(dit, SimpleNamespace(linear_patterns=("blocks.*.self_attn.[qkvo]",)), 4, dtype=torch.bfloat16)
    dit.requires_grad_(False)
    for _, branch in branches(dit):
        branch.b.normal_(std=0.5)
    film.restore(kept)
    changed = step(film, dit, 6, text)
    assert apart(changed, plain) > 0.01
    for _, branch in branches(dit):
        branch.weight = 0.0
        branch.write()
    film.restore(kept)
    assert apart(step(film, dit, 6, text), plain) < 0.01
