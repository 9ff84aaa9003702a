"""Films in low precision on a GPU: fused kernels against their torch references, recorded forwards against plain ones, the blanket cast, a training step."""

import pytest
import torch

from longlive.engine import rollout as rollout_module
from longlive.engine.rollout import Rollout, RolloutSettings, chunk_noise
from longlive.models.spec import TINY, DiTDims
from longlive.models.wan_dit import WanDiT
from longlive.ops import fp4_matmul, fp8_matmul, kv_reading, residual, triton_available
from longlive.ops.triton_available import fp8_tiles_lack
from longlive.precision.backends import BACKENDS
from longlive.precision.capability import FP8_FAMILIES, probe
from longlive.precision.converter import LinearConverter
from longlive.precision.training import FP8_TRAINED, NVFP4_TRAINED, TrainingConverter

FP8 = torch.cuda.is_available() and probe("cuda").family in FP8_FAMILIES
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not FP8, reason="needs a card with FP8")]
DIMS = DiTDims(dim=256, ffn=512, layers=2, heads=4, text_dim=32, text_len=16, freq_dim=64, channels=48)
FRAMES, ROWS, COLUMNS, CHUNKS = 2, 4, 6, 6
CUTS = [False, False, True, False, True, False]


def network(linear, dtype=torch.bfloat16):
    dit = WanDiT(DIMS)
    generator = torch.Generator().manual_seed(0)
    for name, p in dit.named_parameters():
        torch.nn.init.normal_(p, mean=float(name.endswith("norm_q.weight") or name.endswith("norm_k.weight")), std=0.08, generator=generator)
    dit = dit.to("cuda", dtype).requires_grad_(False)
    if linear:
        LinearConverter(backend=BACKENDS[linear]).convert(dit, TINY)
    return dit


def film(dit, store, fixed=False, keep=False, **settings):
    options = {"chunk_frames": FRAMES, "window_frames": 3 * FRAMES, "sink_frames": FRAMES, "shot_offset": 3.0, "steps": 2} | settings
    settings = RolloutSettings(kv_format=store, kv_keep_sinks=keep, **options)
    sizes = {"token_height": ROWS, "token_width": COLUMNS, "batch": 2, "device": torch.device("cuda"), "dtype": torch.bfloat16, "fixed": fixed}
    rollout = Rollout(dit, settings, **sizes)
    with torch.no_grad():
        text = dit.text([torch.randn(n, DIMS.text_dim, generator=torch.Generator().manual_seed(n)).cuda() for n in (3, 5)])
    out = []
    for chunk in range(CHUNKS):
        noise = torch.stack([chunk_noise(0, b, 0, chunk, (FRAMES, DIMS.channels, 2 * ROWS, 2 * COLUMNS)) for b in range(2)])
        out.append(rollout.step(noise, text, [0, 1], [CUTS[chunk], CUTS[chunk - 1]]))
    return torch.stack(out)


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("linear, store", [("fp8", None), ("w4a8", "nvfp4"), ("w4a16", "int8"), ("emulated", "fp8"), (None, "nvfp4")])
def test_fused_films_are_those_of_the_references(linear, store, monkeypatch):
    fused = film(network(linear), store, keep=True)
    for module in (fp4_matmul, fp8_matmul, kv_reading, triton_available):
        if "fused_fp8" in vars(module):
            monkeypatch.setattr(module, "fused_fp8", lambda x: False)
    monkeypatch.setattr(residual, "wants_rows", lambda *_: False)
    plain = film(network(linear), store, keep=True)
    assert apart(fused, plain) < 0.03
    exact = film(network(None), None)
    assert 0 < apart(fused, exact) < 0.5


@pytest.mark.parametrize("linear, store", [("fp8", None), ("w4a8", "nvfp4"), (None, "fp8"), (None, "int8")])
@pytest.mark.parametrize("keep", [False, True])
def test_recorded_films_are_the_films(linear, store, keep):
    dit = network(linear)
    assert apart(film(dit, store, fixed=True, keep=keep), film(dit, store, keep=keep)) < 0.02


@pytest.mark.skipif(FP8 and fp8_tiles_lack(torch.device("cuda")) is not None, reason="needs Hopper or datacentre Blackwell")
def test_films_of_kept_codes_are_those_of_dense_pages(monkeypatch):
    """Attention in FP8 from pages of codes; plain forwards and recorded ones; windows of different length in a batch, which are read through a mask."""
    dit = network("fp8")
    for cuts in ({}, {"recache": True}):
        coded, recorded = (film(dit, None, fixed=fixed, attention="fp8", **cuts) for fixed in (False, True))
        with monkeypatch.context() as patch:
            patch.setattr(rollout_module, "keeps_codes", lambda *_: False)
            dense = film(dit, None, attention="fp8", **cuts)
        assert 0 < apart(coded, dense) < 0.05 and apart(recorded, coded) < 0.02


def test_a_blanket_cast_changes_nothing():
    dit = network("w4a8")
    first = film(dit, None)
    dit.float().to(torch.bfloat16)
    assert torch.equal(film(dit, None), first)


@pytest.mark.parametrize("kind", [NVFP4_TRAINED, FP8_TRAINED])
def test_training_on_a_gpu_has_the_gradients_of_a_cpu(kind):
    """One block's feed-forward, forward and gradients, float32 in both places."""
    found = []
    for device in ("cpu", "cuda"):
        dit = WanDiT(DIMS)
        for p in dit.parameters():
            torch.nn.init.normal_(p, std=0.08, generator=torch.Generator().manual_seed(p.numel()))
        converter = TrainingConverter(kind=kind)
        converter.convert(dit.to(device), TINY)
        converter.moment.begin(5)
        x = torch.randn(2, 48, DIMS.dim, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        y = dit.blocks[0].ffn(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(device))
        first, second = dit.blocks[0].ffn[0], dit.blocks[0].ffn[2]
        found.append([t.detach().cpu() for t in (y, x.grad, first.weight.grad, second.weight.grad, first.bias.grad)])
    for mine, right in zip(found[1], found[0]):
        assert apart(mine, right) < 0.02
