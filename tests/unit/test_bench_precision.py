"""`longlive bench precision` at toy size: every way and store has an entry with its figures, and what cannot run says why and ends nothing."""

import json

import pytest
import torch

from longlive.bench import networks
from longlive.bench.precision import PARTS, PrecisionSettings, Scene, _Bench, bench_precision, relative
from longlive.bench.record import Record
from longlive.cache import quantised
from longlive.core.errors import InputError

TOY = {"model": "tiny", "layers": 1, "height": 32, "width": 64, "repeats": 1, "window": 2}


def test_every_way_and_store_is_measured_against_bf16(tmp_path):
    lines = []
    settings = PrecisionSettings(**TOY, ways=("bf16", "fp8", "native"), stores=("bf16", "nvfp4"), parts=True)
    cases = bench_precision(settings, tmp_path / "precision.json", lines.append)
    by = {(kind, case[kind]): case for case in cases for kind in ("way", "store", "conversion", "part", "network") if kind in case}
    assert by["way", "fp8"]["error_float32"] < 0.2 and by["way", "fp8"]["linear_ms"] > 0 and by["way", "bf16"]["forward_times_bf16"] == 1
    assert "no FP4 tensor cores" in by["network", "native"]["failed"] and ("way", "native") not in by
    assert by["store", "nvfp4"]["store_gib"] < 0.5 * by["store", "bf16"]["store_gib"] and by["store", "nvfp4"]["error_bf16"] > 0
    conversion = by["conversion", "1024x256"]
    assert all(conversion[to]["of_copy"] * conversion[to]["seconds"] == pytest.approx(conversion[to]["copy_seconds"]) for to in ("to_bf16", "to_fp8"))
    assert {part for kind, part in by if kind == "part"} == set(PARTS)
    assert json.loads((tmp_path / "precision.json").read_text()) == cases and all(case["status"] == "done" for case in cases)


def test_errors_of_a_forward_are_bounded(monkeypatch):
    """Small, with matrices that pass on as much as those of the large network; its own bounds are held on a GPU (tests/gpu/test_precision_errors.py)."""
    monkeypatch.setattr(networks, "SHARE", 0.02 * (3072 / 256) ** 0.5)
    scene = Scene(PrecisionSettings(**TOY | {"layers": 4, "width": 32}, prompt_tokens=16), torch.device("cpu"))
    right = scene.forward(scene.network("float32"), scene.store("bf16", torch.float32))()
    pages = scene.store("bf16", torch.bfloat16)
    bf16, fp8, w4a16, w4a8 = (relative(scene.forward(scene.network(name), pages)(), right) for name in ("bf16", "fp8", "w4a16", "w4a8"))
    assert 2 * bf16 < fp8 < 6 * bf16 and 2 * fp8 < w4a16 < w4a8 < 1.1 * w4a16 < 0.12


@pytest.mark.parametrize(
    "words, part",
    [({"ways": ("bf16", "fp5")}, "'fp5' is none of"), ({"stores": ("bf16", "fp4")}, "'fp4' is none of"), ({"ways": ("fp8",)}, "leave it among both")],
)
def test_bad_settings_are_refused(words, part):
    with pytest.raises(InputError, match=part):
        PrecisionSettings(**TOY | words).check()


def test_a_timed_denoising_forward_writes_no_page(monkeypatch):
    scene, written = Scene(PrecisionSettings(**TOY, stores=("bf16", "int8")), torch.device("cpu")), []
    bench = _Bench(scene, Record(None, {}), lambda line: None)
    dit, works = scene.network("bf16"), {}
    bench.base = scene.forward(dit, scene.store("bf16", torch.bfloat16))()
    bench._store("int8", dit, works)
    monkeypatch.setattr(quantised, "write_page", lambda *given: written.append(given))
    works["int8"]()
    assert not written
