"""`bench ops fused` and `bench ops vae`: every operation is measured with its floor, and the parts of a decode are those of the decoder."""

import json

import pytest
import torch
from typer.testing import CliRunner

from longlive.bench.fused import FusedSettings, bench_fused
from longlive.bench.vae import Timed, VaeSettings, bench_vae
from longlive.cli.app import app
from longlive.models.spec import VAEDims
from longlive.models.wan_vae import WanVAE

CPU = torch.device("cpu")


def test_every_operation_of_a_block_has_a_floor(tmp_path):
    path, lines = tmp_path / "fused.json", []
    entries = bench_fused(FusedSettings(model="tiny", height=32, width=32, repeats=1), path, lines.append, device=CPU)
    assert len(entries) == 17 and json.loads(path.read_text()) == entries
    tokens, dim = 8, 256
    rates = entries[0]["rates"]
    by_name = {entry["operation"]: entry for entry in entries}
    gate = by_name["gate, add, norm"]
    assert gate["floor_microseconds"] == pytest.approx(1e6 * 4 * tokens * dim * 4 / rates["bytes_per_second"])  # two in, two out, float32
    assert gate["of_floor"] == pytest.approx(gate["floor_microseconds"] / gate["microseconds"]) and gate["times_reference"] > 0
    assert by_name["gelu, fp8 rows"]["floor_microseconds"] == pytest.approx(1e6 * 5 * tokens * 1024 / rates["bytes_per_second"])  # a code for a float32
    assert "tflops" in by_name["q k v joined"] and "reference_microseconds" not in by_name["linear 256 -> 256"]
    assert all(by_name[name]["reference_microseconds"] > 0 for name in ("fp8 rows", "gelu, fp8 rows", "norm, modulate, fp8 rows"))


def test_the_operations_of_a_decode_are_the_decoder_s():
    vae = WanVAE(VAEDims(encoder_base=4, decoder_base=4))
    timer = Timed(CPU)
    vae.spatial, vae.pointwise = timer, timer.norm
    with torch.no_grad():
        vae.decode(torch.zeros(1, 48, 2, 1, 1))
    rows = {row["what"]: row for row in timer.rows({"bytes_per_second": 1e9, "operations_per_second": 1e9})}
    head = rows["3x3x3 4->12 on 7x8x8"]  # 5 frames and 2 of the past, 8x8 patches
    assert head["calls"] == 1 and timer.spans["3x3x3 4->12 on 7x8x8"].operations == 2 * 5 * 8 * 8 * 27 * 4 * 12
    doubling = timer.spans["doubling 3x3 8->8 on 5x4x4"]
    assert doubling.operations == 2 * 5 * 8 * 8 * (4 * 8) * 8  # four taps a pixel of the doubled frame
    assert sum(span.calls != [] for name, span in timer.spans.items() if name.startswith("norm")) > 5


def test_decoding_is_measured_by_parts(tmp_path):
    lines = []
    entries = bench_vae(VaeSettings(model="tiny", groups=(0, 4), height=32, width=32, repeats=1), tmp_path / "vae.json", lines.append, device=CPU)
    assert [entry["group"] for entry in entries] == [0, 4] and all(entry["parts"] and entry["ms_per_chunk"] > 0 for entry in entries)
    assert any("convolutions" in line for line in lines)
    (tiled,) = bench_vae(VaeSettings(model="tiny", height=32, width=32, tile_rows=1, repeats=1), None, lines.append, device=CPU)
    assert "tiles of 1 latent rows" in lines[-1] and tiled["tile_rows"] == 1 and tiled["parts"] != entries[0]["parts"]


@pytest.mark.parametrize("words", [["fused", "--repeats", "1"], ["vae", "--repeats", "1"]])
def test_the_commands(tmp_path, words):
    path = tmp_path / "ops.json"
    result = CliRunner().invoke(app, ["bench", "ops", *words, "--model", "tiny", "--height", "32", "--width", "32", "--json", str(path)])
    assert result.exit_code == 0 and json.loads(path.read_text()), result.output
