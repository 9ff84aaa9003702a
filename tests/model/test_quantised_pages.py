"""Stores of quantised keys and values: what a rollout reads from them, when they are written, and that nothing else of a rollout knows."""

from __future__ import annotations

import pytest
import torch
from dit_toys import DIMS, film, toy_dit, toy_noise, toy_prompts, toy_rollout

from longlive.cache.pages import Pages
from longlive.cache.policy import Window
from longlive.cache.quantised import ANCHOR, PIN, QuantisedPages
from longlive.core.tokens import Tokens
from longlive.engine.rollout import RolloutSettings
from longlive.ops.kv_formats import FORMATS, dequantise_page, quantise_page
from longlive.ops.rope import apply_rope, rope_tables

CUTS = [False, False, True, False, True, False]
LOOSE = {"fp8": 0.05, "int8": 0.02, "nvfp4": 0.2}


def story(dit, batch=1, dtype=torch.float64, **settings):
    """(rollout, latents) of a film of six chunks with two cuts, window of three."""
    rollout = toy_rollout(dit, batch, **settings)
    with torch.no_grad():
        text = dit.text(toy_prompts(6))
    shifted = [CUTS, [False, True, False, False, False, True]][:batch]
    return rollout, film(rollout, text, toy_noise(batch, 6), cuts=shifted)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_film_stays_close_to_that_of_the_dense_store(format, batch):
    dit = toy_dit()
    (_, dense), (rollout, quantised) = story(dit, batch), story(dit, batch, kv_format=format)
    assert isinstance(rollout.stores[0], QuantisedPages)
    first, later = (((quantised - dense)[:, s].norm() / dense[:, s].norm()).item() for s in (slice(0, 1), slice(1, None)))
    assert first < 1e-6 and 0 < later < LOOSE[format], (first, later)


class RoundTrip(Pages):
    """A dense store of unrotated keys in which a commit leaves what a quantised store would give back: the meaning of one."""

    unrotated, format, place = True, "nvfp4", None

    def begin(self, windows, chunk, tokens, slot_B, commit):
        if self.place is None:
            self.place = torch.zeros(*self.k[0].shape[:2], tokens.frames, dtype=torch.float64)
        self.place[self.rows_B, slot_B] = tokens.position_BF.double().expand(len(windows), -1)
        self.commit, self.own = commit, {}

    def positions(self, filled):
        return self.place[:, :filled].flatten(1)

    def write(self, layer, slot_B, k, v):
        given = [(k, v), tuple(dequantise_page(quantise_page(x, self.format)).to(x.dtype) for x in (k, v))]
        super().write(layer, slot_B, *given[0])
        if self.commit:
            self.own[layer] = (slot_B, *given[1])

    def read(self, layer, filled, rope=None):
        keys, values = super().read(layer, filled, rope)
        if self.commit:
            keys, values = keys.clone(), values.clone()
        return keys, values

    def settle(self):
        for layer, (slot_B, k, v) in self.own.items():
            super().write(layer, slot_B, k, v)


@pytest.mark.parametrize("format", FORMATS)
def test_a_read_is_quantise_dequantise_and_rotate_at_the_frames_positions(format, monkeypatch):
    """Against the same rollout over dense memory that is overwritten, after each commit, with what came back from the format."""
    dit = toy_dit()
    with monkeypatch.context() as patched:
        patched.setattr(RolloutSettings, "store", lambda self, *sizes, **how: RoundTrip(*sizes, **how))
        slow = toy_rollout(dit, 2)
    monkeypatch.setattr(RoundTrip, "format", format)
    with torch.no_grad():
        text = dit.text(toy_prompts(6))
    fast, noise = toy_rollout(dit, 2, kv_format=format), toy_noise(2, 6)
    cuts = [CUTS, [False, True, False, False, False, True]]
    for c in range(6):
        theirs, mine = (r.step(noise[:, c], text, [c, c], [row[c] for row in cuts]) for r in (slow, fast))
        slow.stores[0].settle()
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_only_the_clean_pass_writes_and_memory_never_moves(format):
    dit = toy_dit()
    rollout = toy_rollout(dit, 1, kv_format=format)
    store = rollout.stores[0]
    with torch.no_grad():
        text = dit.text(toy_prompts(4))
    noise = toy_noise(1, 4)
    places = [t.data_ptr() for t in (*store.parts.values(), store.buffer)]
    for c in range(4):
        before = {name: t.clone() for name, t in store.parts.items()}

        def untouched(*_):
            assert all(torch.equal(before[name], t) for name, t in store.parts.items())

        rollout.step(noise[:, c], text, [c], [False], on_step=untouched)
        assert not all(torch.equal(before[name], t) for name, t in store.parts.items())
    assert places == [t.data_ptr() for t in (*store.parts.values(), store.buffer)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("keep", [False, True])
def test_snapshot_and_restore_are_exact(format, keep):
    dit = toy_dit()
    rollout = toy_rollout(dit, 1, kv_format=format, kv_keep_sinks=keep)
    with torch.no_grad():
        text = dit.text(toy_prompts(6))
    noise = toy_noise(1, 6)

    def steps(numbers):
        return [rollout.step(noise[:, c], text, [c], [CUTS[c]]) for c in numbers]

    steps(range(3))
    snapshot = rollout.snapshot()
    once = steps(range(3, 6))
    rollout.restore(snapshot)
    assert all(torch.equal(a, b) for a, b in zip(once, steps(range(3, 6))))
    fresh = toy_rollout(dit, 1, kv_format=format, kv_keep_sinks=keep)
    fresh.restore(snapshot)
    rollout = fresh
    assert all(torch.equal(a, b) for a, b in zip(once, steps(range(3, 6))))


def test_anchor_and_pin_can_stay_in_full():
    """Chunk by chunk: the slots that hold the anchor and the latest cut read back exactly, all others by the format; a taken slot is let go."""
    torch.manual_seed(0)
    store = QuantisedPages(1, 1, 3, 8, 2, 16, device=torch.device("cpu"), dtype=torch.float32, format="nvfp4", keep_anchor=True, keep_pin=True)
    tokens = Tokens(torch.zeros(1, 2), torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64), 2, 2)
    pages = {}

    def commit(chunk, window):
        slot = torch.tensor([window.slot(chunk)])
        pages[chunk] = torch.randn(2, 1, 8, 2, 16)
        store.begin([window], chunk, tokens, slot, True)
        store.write(0, slot, *pages[chunk])
        store._own = None

    def exact(window):
        read = store.read(0, len(window.slots))
        return {chunk for i, chunk in enumerate(window.slots) if all(torch.equal(read[k][:, 8 * i : 8 * i + 8], pages[chunk][k]) for k in (0, 1))}

    for chunk, window, kept in [
        (0, Window((0,)), {0}),
        (1, Window((0, 1), 1), {0, 1}),
        (2, Window((0, 1, 2), 1), {0, 1}),
        (3, Window((0, 1, 3), 3), {0, 3}),
        (4, Window((0, 4, 3), None), {0, 3}),
        (5, Window((0, 4, 5), None), {0}),
    ]:
        commit(chunk, window)
        assert exact(window) == kept, chunk
    assert store.kept_slot[ANCHOR].tolist() == [0] and store.kept_slot[PIN].tolist() == [-1]


def test_keeping_sinks_brings_a_film_nearer():
    dit = toy_dit()
    dense, coarse, kept = (story(dit, **s)[1] for s in ({}, {"kv_format": "nvfp4"}, {"kv_format": "nvfp4", "kv_keep_sinks": True}))
    assert (kept - dense).norm() < (coarse - dense).norm()


@pytest.mark.parametrize("format", FORMATS)
def test_relative_positions_and_gradients_read_the_same_store(format):
    dit = toy_dit()
    (_, dense), (rollout, quantised) = story(dit, relative=True), story(dit, relative=True, kv_format=format)
    assert 0 < (quantised - dense).norm() / dense.norm() < LOOSE[format]
    store, rows = rollout.stores[0], torch.tensor([[2, 0]])
    keys, _ = store.copy_out(1, rows)
    assert torch.equal(keys[:, : keys.shape[1] // 2], store.read(1, 3)[0].unflatten(1, (3, -1))[:, 2])


def test_keys_are_rotated_in_float32_and_rounded_once():
    store = QuantisedPages(1, 1, 1, 12, 2, 24, device=torch.device("cpu"), dtype=torch.bfloat16, format="int8")
    tokens = Tokens(torch.tensor([[5.0, 6.0]]), torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64), 2, 3)
    x = torch.randn(1, 12, 2, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    store.begin([Window((0,))], 0, tokens, torch.tensor([0]), True)
    store.write(0, torch.tensor([0]), x, x)
    store._own = None
    rope = rope_tables(tokens, 24)
    right = apply_rope(dequantise_page(quantise_page(x, "int8")), *rope).bfloat16()
    assert torch.equal(store.read(0, 1, rope)[0], right)


def test_bytes_are_those_of_the_format():
    sizes = (DIMS.layers, 1, 3, 128, 2, 128)
    how = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    dense = Pages(*sizes, **how).bytes
    shares = {format: QuantisedPages(*sizes, format=format, **how).bytes / dense for format in FORMATS}
    assert 0.5 <= shares["fp8"] < 0.52 and 0.5 <= shares["int8"] < 0.53 and 0.28 < shares["nvfp4"] < 0.3
