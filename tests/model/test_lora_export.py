"""`longlive export` of a LoRA's file: which LoRA is meant, what is said of it, and that no scale is made up."""

from dataclasses import replace

import pytest
import torch
from lora_toys import toy_adapter

from longlive.cli.app import app, run
from longlive.models.lora_files import WRITERS, read_lora, write_lora

Q = "blocks.0.self_attn.q"
ABOUT = {"trainer": "score_distillation", "step": "7", "steps": "4", "seed": "3", "weights": "ema"}


@pytest.fixture
def files(tmp_path):
    """own.pt (rank 4, alpha 2, what a run says of it), silent.pt (the same without alpha, as published), raw.pt (no average)."""
    own = replace(toy_adapter(rank=4, alpha=2.0, dtype=torch.float32), metadata=ABOUT)
    write_lora(tmp_path / "own.pt", own)
    write_lora(tmp_path / "silent.pt", replace(own, layers={name: replace(layer, alpha=None) for name, layer in own.layers.items()}))
    content = torch.load(tmp_path / "own.pt", weights_only=True)
    torch.save(content | {"weights": "raw"}, tmp_path / "raw.pt")
    return tmp_path


def export(files, name, out, *words):
    return run(app, ["export", str(files / name), str(files / out), "--dtype", "fp32", *words])


def refusal(capsys, files, *words):
    capsys.readouterr()
    assert export(files, *words) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and out == ""
    return error


def product(adapter):
    layer = adapter.layers[Q]
    return layer.scale * layer.b_OR @ layer.a_RI


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_says_what_the_run_said(files, layout):
    out = f"again{WRITERS[layout][0]}"
    assert export(files, "own.pt", out, "--layout", layout) == 0
    found = read_lora(files / out)
    assert {key: str(found.metadata[key]) for key in ABOUT} == ABOUT
    torch.testing.assert_close(product(found), product(read_lora(files / "own.pt")))


def test_a_lower_rank(files, capsys):
    assert export(files, "own.pt", "narrow.pt", "--rank", "2") == 0 and "rank 2" in capsys.readouterr().out
    found = read_lora(files / "narrow.pt")
    assert found.rank == found.alpha == 2
    assert "at least 1" in refusal(capsys, files, "own.pt", "none.pt", "--rank", "0")


def test_the_form_of_a_lora_is_its_layout(files, capsys):
    for name in ("pt", "safetensors"):
        assert f"--format {name} is for a generator" in refusal(capsys, files, "own.pt", "x.pt", "--format", name)
    assert not (files / "x.pt").exists()


@pytest.mark.parametrize("words", [["x.safetensors", "--layout", "kohya"], ["x.safetensors", "--layout", "diffusers"], ["x"], ["x.pt", "--rank", "2"]])
def test_a_scale_is_not_made_up(files, capsys, words):
    """A file without alpha stays one in the published layout; every other one says a scale."""
    assert "silent.pt states no alpha" in (said := refusal(capsys, files, "silent.pt", *words)) and "give --alpha" in said and "4 if that was its rank" in said
    assert not (files / words[0]).exists()
    assert export(files, "silent.pt", *words, "--alpha", "8") == 0
    if "--rank" not in words:
        torch.testing.assert_close(product(read_lora(files / words[0])), 4 * product(read_lora(files / "own.pt")))
    assert export(files, "silent.pt", "still.pt") == 0 and read_lora(files / "still.pt").alpha is None


def test_an_alpha_that_contradicts(files, capsys):
    assert "--alpha 8 but" in (said := refusal(capsys, files, "own.pt", "x.pt", "--alpha", "8")) and "states its own, 2; leave --alpha out" in said
    assert "above 0" in refusal(capsys, files, "silent.pt", "x.pt", "--alpha", "0")
    assert export(files, "own.pt", "x.pt", "--alpha", "2") == 0
    torch.save({"patch_embedding.weight": torch.zeros(2)}, files / "generator.pt")
    assert "--alpha 2.0 is for a LoRA" in refusal(capsys, files, "generator.pt", "y.pt", "--alpha", "2")


def test_the_average_is_not_asked_for_twice(files, capsys):
    assert "own.pt is the average of the LoRA's weights already; leave --ema out" in refusal(capsys, files, "own.pt", "x.pt", "--ema")
    assert "raw.pt holds no average" in refusal(capsys, files, "raw.pt", "x.pt", "--ema")


def test_a_shipped_adapter_by_its_name(tmp_path, capsys):
    assert run(app, ["export", "tiny-4steps", str(tmp_path / "four.safetensors"), "--layout", "kohya"]) == 0
    assert read_lora(tmp_path / "four.safetensors").metadata["steps"] == "4"
    assert run(app, ["export", "tiny-4step", str(tmp_path / "x.pt")]) == 2
    assert "did you mean tiny-4steps" in capsys.readouterr().err
