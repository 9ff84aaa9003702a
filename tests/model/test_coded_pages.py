"""Pages that hold what attention in FP8 reads give the film of dense pages under the same attention, where a code is a function of its value alone."""

import pytest
import torch
from dit_toys import DIMS, FRAMES, toy_dit, toy_prompts

from longlive.cache.coded import CodedPages
from longlive.cache.pages import Pages
from longlive.engine import rollout as rollout_module
from longlive.engine.rollout import Rollout, RolloutSettings
from longlive.ops.coded_attention import coded_attention, value_codes, value_rows, write_codes
from longlive.ops.fp8 import to_e4m3

ROWS, COLUMNS, CHUNKS = 2, 4, 7
CUTS = [False, False, True, False, False, True, False]


def film(monkeypatch, coded, other_cuts=CUTS, fixed=False, **settings):
    """(latents, rollout) of a film of two samples."""
    monkeypatch.setattr(rollout_module, "keeps_codes", lambda *_: coded)
    dit = toy_dit()
    options = {"chunk_frames": FRAMES, "window_frames": 3 * FRAMES, "sink_frames": FRAMES, "steps": 2, "attention": "fp8"} | settings
    sizes = {"token_height": ROWS, "token_width": COLUMNS, "batch": 2, "device": torch.device("cpu"), "dtype": torch.float64, "fixed": fixed}
    made = Rollout(dit, RolloutSettings(**options), **sizes)
    with torch.no_grad():
        text = dit.text(toy_prompts(2))
    return torch.stack([advance(made, text, chunk, [CUTS[chunk], other_cuts[chunk]]) for chunk in range(CHUNKS)]), made


def advance(made, text, chunk, cuts):
    noise = torch.randn(2, FRAMES, DIMS.channels, 2 * ROWS, 2 * COLUMNS, generator=torch.Generator().manual_seed(chunk))
    return made.step(noise, text, [0, 1], cuts, negative=0)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("settings", [{}, {"guidance": 3.0}, {"window_frames": FRAMES, "sink_frames": 0}], ids=str)
def test_a_film_is_that_of_dense_pages(settings, fixed, monkeypatch):
    (dense, plain), (coded, other) = (film(monkeypatch, kind, fixed=fixed, **settings) for kind in (False, True))
    assert type(plain.stores[0]) is Pages and type(other.stores[0]) is CodedPages
    assert torch.equal(coded, dense) and other.stores[0].bytes * 8 == plain.stores[0].bytes  # float64


def test_a_mask_reads_what_the_codes_say(monkeypatch):
    shifted = [CUTS[-1], *CUTS[:-1]]
    (dense, _), (coded, _) = (film(monkeypatch, kind, shifted, recache=True) for kind in (False, True))
    assert 0 < (coded - dense).norm() / dense.norm() < 0.05


def test_relative_positions_keep_dense_pages(monkeypatch):
    assert type(film(monkeypatch, True, relative=True)[1].stores[0]) is Pages


def test_a_snapshot_is_exact(monkeypatch):
    _, made = film(monkeypatch, True)
    with torch.no_grad():
        text = made.dit.text(toy_prompts(2))
    kept = made.snapshot()
    first = advance(made, text, CHUNKS, [False, False])
    made.restore(kept)
    assert torch.equal(advance(made, text, CHUNKS, [False, False]), first)


def test_slots_hold_codes_in_the_order_of_the_kernel():
    k, v = torch.randn(2, 2, 48, 3, 8, generator=torch.Generator().manual_seed(0))
    columns = value_codes(v)
    assert torch.equal(value_rows(columns).float(), to_e4m3(v).float())
    assert torch.equal(columns[:, :, :, :16].float(), to_e4m3(v).float()[:, [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]].permute(0, 2, 3, 1))
    store = CodedPages(1, 2, 3, 48, 3, 8, device=torch.device("cpu"), dtype=torch.float32)
    store.write(0, torch.tensor([2, 0]), k, v)
    keys, values = store.read(0, 3)
    for given, found in ((k, keys), (v, values)):
        found = found.unflatten(1, (3, 48))
        assert torch.equal(found[0, 2], to_e4m3(given[0]).float()) and torch.equal(found[1, 0], to_e4m3(given[1]).float())
        assert not found[0, :2].any() and not found[1, 1:].any()
    copied = store.copy_out(0, torch.tensor([[2], [0]]))
    assert torch.equal(copied[1], to_e4m3(v).float())
    write_codes(k, v, torch.tensor([0, 0]), store.k[0], store.v[0])
    q = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(1))
    logits = torch.einsum("bnhd,bmhd->bhnm", to_e4m3(q).float(), to_e4m3(k).float()) * 8**-0.5
    right = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), to_e4m3(v).float())
    torch.testing.assert_close(coded_attention(q, *store.codes(0, 1)), right, rtol=1e-5, atol=1e-6)


def test_a_chunk_whose_products_stay_in_bf16_is_said(monkeypatch, caplog):
    """Values take FP8 in blocks of 16 tokens; a CPU has no such products."""
    monkeypatch.setattr(rollout_module, "keeps_codes", lambda *_: False)
    monkeypatch.setattr(rollout_module, "Pages", lambda *sizes, **how: None)
    settings, said = RolloutSettings(chunk_frames=8, attention="fp8"), "a chunk of 24 tokens is no multiple of 16"
    for tokens, device in ((32, "cuda"), (24, "cpu"), (24, "cuda")):
        assert said not in caplog.text
        settings.store(1, 1, 3, tokens, 2, 8, device=torch.device(device), dtype=torch.bfloat16)
    assert said in caplog.text
