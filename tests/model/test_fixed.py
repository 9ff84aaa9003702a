"""Forwards at fixed addresses give what the network gives, whatever changes between them; the same code is recorded as graphs on a GPU (tests/gpu)."""

import itertools

import pytest
import torch
from dit_toys import FRAMES, toy_dit, toy_noise, toy_prompts, toy_rollout
from tiny_pipeline import SPEC

from longlive.engine.fixed import FixedForwards, FixedText
from longlive.models.lora import attach, branches

CHUNKS = 7


def films(dit, changes, **settings):
    """The same film with and without fixed forwards. `changes(chunk)` gives (prompts, prompt rows, cuts)."""
    found = []
    for fixed in (False, True):
        rollout = toy_rollout(dit, 2, **settings)
        rollout.fixed = FixedForwards(dit, torch.device("cpu")) if fixed else None
        noise, texts, out = toy_noise(2, CHUNKS), {}, []
        for chunk in range(CHUNKS):
            prompts, rows, cuts = changes(chunk)
            if prompts not in texts:
                texts[prompts] = dit.text(toy_prompts(5)[:prompts])
            out.append(rollout.step(noise[:, chunk], texts[prompts], rows, cuts, negative=0))
        found.append((torch.stack(out), rollout))
    return found


SETTINGS = [
    {}, {"recache": True}, {"relative": True}, {"guidance": 3.0}, {"guidance": 3.0, "batched_guidance": False},
    {"kv_format": "nvfp4", "kv_keep_sinks": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_film_is_the_same(settings):
    def changes(chunk):
        return (3 if chunk < 4 else 5), [chunk % 3, 1], [chunk == 2, chunk in (3, 5)]

    (plain, _), (fixed, rollout) = films(toy_dit(), changes, window_frames=3 * FRAMES, **settings)
    torch.testing.assert_close(fixed, plain, rtol=1e-9, atol=1e-9)
    assert 6 <= len(rollout.fixed.forwards) <= 40 and max(f.runs for f in rollout.fixed.forwards.values()) > 3


def test_memory_stays_where_it_is():
    _, (_, rollout) = films(toy_dit(), lambda chunk: (3, [0, 1], [False, False]), window_frames=3 * FRAMES)
    assert len(rollout.fixed.forwards) == 6  # one to three filled slots, denoise and commit
    places = {key: f.x_BNc.data_ptr() for key, f in rollout.fixed.forwards.items()}
    rollout.step(toy_noise(2, 1)[:, 0], toy_dit().text(toy_prompts(3)), [0, 1], [False, False], negative=0)
    assert places == {key: f.x_BNc.data_ptr() for key, f in rollout.fixed.forwards.items()}


def test_text_in_fixed_memory_follows_prompts_and_weights():
    dit = toy_dit()
    one, two = (dit.text([p]) for p in toy_prompts(2))
    with torch.no_grad():
        fixed = FixedText(dit, one, 32)
        fixed.take(one)
        first = fixed.kept(0)[0].clone()
        fixed.take(two)
        assert not torch.equal(first, fixed.kept(0)[0])
        fixed.take(one)
        assert torch.equal(first, fixed.kept(0)[0]) and fixed.bias_RM[:, one.bias_RM.shape[1] :].isinf().all()
        dit.blocks[0].cross_attn.k.weight.mul_(1.5)
        fixed.take(one)
        assert not torch.equal(first, fixed.kept(0)[0])


def test_recordings_end_when_adapters_change():
    dit = toy_dit()
    fixed = FixedForwards(dit, torch.device("cpu"))
    fixed.begin()
    fixed.forwards["x"] = None
    fixed.begin()
    assert fixed.forwards
    attach(dit, SPEC, 2)
    fixed.begin()
    assert not fixed.forwards
    fixed.forwards["x"] = None
    for _, branch in branches(dit):
        branch.weight = 0.0
    fixed.begin()
    assert not fixed.forwards


def test_recordings_that_ended_leave_their_memory(monkeypatch):
    """A pool whose recordings are gone is not recorded into again (CUDA refuses it)."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", itertools.count().__next__)
    dit = toy_dit()
    fixed = FixedForwards(dit, torch.device("cuda"))
    fixed.begin()
    first = fixed.pool
    attach(dit, SPEC, 2)
    fixed.begin()
    second = fixed.pool
    fixed.begin()
    assert first != second == fixed.pool
