"""`bench generate`: figures follow from arrival times, every case is a row with the documented names, a failing case does not end the others."""

import json

import pytest
import torch
from typer.testing import CliRunner

from longlive.bench import generate as generate_bench
from longlive.bench.film import Arrivals
from longlive.bench.generate import GenerateSettings, bench_generate
from longlive.bench.networks import RandomNetworks, RandomWords
from longlive.bench.timing import Kernel, by_kind, kind_of
from longlive.cli.app import app
from longlive.core.errors import InputError

ROW = {
    "precision", "steps", "vae", "vae_fp8", "gpus", "width", "height", "window", "chunks", "denoise_fps", "decode_ms_per_chunk", "end_to_end_fps", "ttff_s",
    "interchunk_ms", "deadline_attainment", "real_time_factor", "peak_gib", "warmup_s", "hardware", "versions", "commit",
}  # fmt: skip
CPU = torch.device("cpu")


def small(**changes):
    return GenerateSettings(
        **({"model": "tiny", "precisions": ("float32",), "height": 32, "width": 32, "layers": 1, "chunks": 1, "steps": (1,), "window": 8} | changes)
    )


def test_figures_follow_from_arrivals():
    # chunk 0 shows 29 frames, later ones 32; playback of 24 fps begins at 2.0 s
    film = Arrivals(at=(2.0, 2.8, 4.4, 4.8, 5.8), denoise=(0.1,) * 5, warm=2, frames=32)
    assert film.steady == pytest.approx([1.6, 0.4, 1.0])
    assert film.fps == pytest.approx(32.0) and film.mean_fps == pytest.approx(32.0) and film.real_time == pytest.approx(32 / 24)
    assert film.percentiles_ms()["p50"] == pytest.approx(1000)
    assert film.attainment() == 1.0
    # due at 2 + (29, 61, 93)/24 = 3.21, 4.54, 5.88: the second of them is late
    late = Arrivals(at=(2.0, 3.0, 4.6, 5.0), denoise=(0.1,) * 4, warm=2, frames=32)
    assert late.attainment() == pytest.approx(2 / 3)


def test_every_case_is_a_row(tmp_path):
    path, lines = tmp_path / "generate.json", []
    rows = bench_generate(small(steps=(2, 1), vaes=("wan", "none")), path, lines.append, device=CPU)
    assert json.loads(path.read_text()) == json.loads(json.dumps(rows))
    assert [(row["steps"], row["vae"]) for row in rows] == [(2, "wan"), (1, "wan"), (2, "none"), (1, "none")]
    for row in rows[:2]:
        assert ROW <= set(row) and row["denoise_fps"] > row["end_to_end_fps"] > 0 and set(row["interchunk_ms"]) == {"p50", "p95", "p99"}
    assert ROW <= set(rows[2]) and rows[2]["end_to_end_fps"] is None and rows[2]["denoise_fps"] > 0
    assert any("end to end" in line for line in lines)


def test_a_row_names_the_codec_and_whether_it_is_in_fp8(tmp_path):
    lines = []
    choices = ("vae=none", "steps=1,vae=wan+fp8")
    rows = bench_generate(small(), tmp_path / "rows.json", lines.append, device=CPU, compare=choices)
    assert [(row["vae"], row["vae_fp8"]) for row in rows] == [("none", False), ("wan", True)] and any("wan+fp8" in line for line in lines)


def test_a_case_that_fails_is_a_row(monkeypatch):
    def broken(pipeline):
        raise RuntimeError("no such algorithm\nmore words")

    monkeypatch.setattr(generate_bench, "ChunkDecoder", broken)
    (row,) = bench_generate(small(), None, lambda line: None, device=CPU)
    assert row["failed"] == "no such algorithm" and row["denoise_fps"] > 0 and row["end_to_end_fps"] > 0


def test_no_measurement_begins_late():
    (row,) = bench_generate(small(seconds=-1.0), None, lambda line: None, device=CPU)
    assert "not begun" in row["failed"] and ROW <= set(row) and row["denoise_fps"] is None


def test_two_settings_in_turn(tmp_path):
    lines = []
    rows = bench_generate(small(steps=(4,), chunks=2), tmp_path / "compare.json", lines.append, device=CPU, compare=("vae=none", "vae=none,steps=1"))
    assert [row["steps"] for row in rows] == [4, 1] and "times_first" in rows[1] and all(ROW <= set(row) and row["decode"] == "inline" for row in rows)
    assert rows[1]["times_first"] == pytest.approx(rows[0]["interleaved_ms_per_chunk"] / rows[1]["interleaved_ms_per_chunk"])
    assert "times as fast as" in lines[-1]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"precisions": ("fp3",)}, "'fp3' is none of"),
        ({"vaes": ("wam",)}, r"--vae 'wam' is none of wan, lightvae_v1, lightvae_v2, alone or with \+fp8, or none"),
        ({"vaes": ("wan+fp4",)}, r"--vae 'wan\+fp4' is none of wan, lightvae_v1"),
        ({"decode": "other-device"}, "inline, same-stream, side-stream"),
        ({"width": None}, "belong together"),
        ({"window": 12}, "--window 12"),
        ({"steps": (0,)}, "at least 1"),
        ({"layers": 0}, "at least one block"),
    ],
)
def test_what_cannot_run_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        bench_generate(small(**changes), None, lambda line: None, device=CPU)


@pytest.mark.parametrize("words", ["speed=3", "decode=inline", "steps", "steps=two", "steps="])
def test_a_comparison_names_settings(words):
    with pytest.raises(InputError, match="is no setting"):
        bench_generate(small(), None, lambda line: None, device=CPU, compare=("", words))


def test_random_networks_are_the_same_every_time_and_no_matrix_is_zero():
    one, two = (RandomNetworks("tiny", None, CPU, layers=1).pipeline("bf16").dit.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(weight.count_nonzero() > 0.9 * weight.numel() for name, weight in one.items() if weight.ndim > 1)
    words = RandomWords(5, 3, CPU, torch.float32)
    assert torch.equal(words.encode(["a"])[0], RandomWords(5, 3, CPU, torch.float32).encode(["b", "a"])[1])


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize256x128x64", "convolution"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false>", "copies"),
        ("fused_norm_silu", "fused"),
        ("fused_attention_fp8", "attention"),
        ("fused_convolution_fp8", "convolution"),
    ],
)
def test_kernels_of_generation_are_sorted_by_name(kernel, kind):
    assert kind_of(kernel) == kind
    assert by_kind([Kernel(kernel, kind, 1.0, 1), Kernel("x", kind, 0.5, 1), Kernel("y", "gemm", 2.0, 1)]) == {"gemm": 2.0, kind: 1.5}


def test_the_command_writes_its_rows(tmp_path):
    path = tmp_path / "rows.json"
    words = [
        "bench",
        "generate",
        "--model",
        "tiny",
        "--precision",
        "float32",
        "--height",
        "32",
        "--width",
        "32",
        "--layers",
        "1",
        "--chunks",
        "1",
        "--window",
        "8",
    ]
    result = CliRunner().invoke(app, [*words, "--steps", "1", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert ROW <= set(json.loads(path.read_text())[0]) and f"wrote {path}" in result.output
