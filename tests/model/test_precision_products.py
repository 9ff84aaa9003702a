"""Number formats times everything else: linear backends x stores x given frames x shots x LoRA, on toy films.

Whatever is combined, a film does not depend on its batch, goes on from a snapshot as if it had not stopped, and stays near the plain one. All sums run in
float64: in float32 a batch changes their last bits, which now and then turn an activation to the next code, and a toy makes much of that.
"""

import itertools
from functools import partial

import pytest
import torch
from dit_toys import FRAMES, film, toy_dit, toy_noise, toy_prompts, toy_rollout

from longlive.diffusion.known import KnownFrames
from longlive.models.lora import attach, branches
from longlive.models.spec import TINY
from longlive.ops import fp4_matmul, fp8_matmul
from longlive.ops.quant_matmul import w8a8
from longlive.precision.backends import BACKENDS
from longlive.precision.converter import LinearConverter

CHUNKS = 4
CUTS = [[False, False, True, False], [False, True, False, True]]
FORMATS = [pair for pair in itertools.product((None, "fp8", "w4a8", "emulated"), (None, "nvfp4", "int8")) if any(pair)]
SCENES = itertools.cycle([(True, True, True), (False, True, True), (True, True, False), (True, False, True), (False, False, False)])
PRODUCTS = [(*formats, *scene) for formats, scene in zip(FORMATS, SCENES)]


@pytest.fixture(autouse=True)
def wide_sums(monkeypatch):
    monkeypatch.setattr(fp8_matmul, "w8a8", partial(w8a8, wide=torch.float64))
    monkeypatch.setattr(fp4_matmul, "wide_product", lambda a, b: a.double() @ b.double().t())


def network(linear, lora):
    dit = toy_dit()
    if linear:
        LinearConverter(backend=BACKENDS[linear]).convert(dit, TINY)
    if lora:
        attach(dit, TINY, rank=2, generator=torch.Generator().manual_seed(3))
        for _, branch in branches(dit):
            torch.nn.init.normal_(branch.b, std=0.1, generator=torch.Generator().manual_seed(4))
    return dit.eval().requires_grad_(False)


def make(dit, store, given, shots, rows, stop=None):
    """Latents of the films `rows` of two; after `stop` chunks the rollout goes on from a snapshot, in another one."""
    batch = len(rows)
    noise, first = toy_noise(2, CHUNKS)[rows], torch.randn(2, 1, *toy_noise(1, 1).shape[3:], generator=torch.Generator().manual_seed(9))[rows]
    rollout, text = toy_rollout(dit, batch, kv_format=store, kv_keep_sinks=shots), dit.text(toy_prompts(CHUNKS))
    known = KnownFrames(first) if given else None
    cuts = [CUTS[row] if shots else [False] * CHUNKS for row in rows]
    if stop is None:
        return film(rollout, text, noise, cuts=cuts, known=known)
    done = film(rollout, text, noise[:, :stop], cuts=[c[:stop] for c in cuts], known=known)
    snapshot, rollout = rollout.snapshot(), toy_rollout(dit, batch, kv_format=store, kv_keep_sinks=shots)
    rollout.restore(snapshot)
    rest = [rollout.step(noise[:, c], text, [c] * batch, [row[c] for row in cuts], known=known) for c in range(stop, CHUNKS)]
    return torch.cat((done, torch.stack(rest, dim=1)), dim=1)


@pytest.mark.parametrize("linear, store, given, shots, lora", PRODUCTS)
def test_products(linear, store, given, shots, lora):
    dit = network(linear, lora)
    both = make(dit, store, given, shots, [0, 1])
    for row in range(2):
        torch.testing.assert_close(make(dit, store, given, shots, [row])[0], both[row], rtol=1e-3, atol=1e-3)
    assert torch.equal(make(dit, store, given, shots, [0, 1], stop=2), both)
    plain = make(network(None, lora), None, given, shots, [0, 1])
    error = ((both - plain).norm() / plain.norm()).item()
    assert 0 < error < (0.5 if linear == "emulated" else 0.2), error
    if given:
        assert torch.equal(both[:, 0, 0], plain[:, 0, 0]) and FRAMES > 1
