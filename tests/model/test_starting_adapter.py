"""What a LoRA goes on from: one file, of one rank and one scale, that the adapter section does not contradict; all else is said in one line."""

from dataclasses import replace

import pytest
import torch
from dmd_toys import distillation
from lora_toys import toy_adapter

from longlive.cli.app import app, run
from longlive.config import load_config
from longlive.core.errors import ConfigError
from longlive.models.lora_files import write_lora
from longlive.train.cast import STUDENT, starting_adapter

WIDE = toy_adapter(rank=4, alpha=2.0, dtype=torch.float32)
STEEP, NARROW = (toy_adapter(rank=r, alpha=a, only="cross_attn", seed=7, dtype=torch.float32) for r, a in ((4, 6.0), (2, 1.0)))


def started(folder, given, **adapter):
    tree = distillation(folder, adapter={"rank": None, "alpha": None} | adapter, checkpoints={"lora_ckpt": given, "generator_ckpt": "nowhere.safetensors"})
    return starting_adapter(load_config(tree), STUDENT)


def refused(folder, given, **adapter):
    with pytest.raises(ConfigError) as caught:
        started(folder, given, **adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_file_is_named(tmp_path):
    assert started(tmp_path, None) is None
    path = str(write_lora(tmp_path / "a.pt", WIDE))
    assert started(tmp_path, [path]).alpha == started(tmp_path, path).alpha == 2.0
    assert "lora_ckpt names 0 files: training starts from one LoRA; give one" in refused(tmp_path, [])
    assert "lora_ckpt names 2 files" in refused(tmp_path, [path, path])


def test_a_section_that_contradicts_the_file(tmp_path):
    path = str(write_lora(tmp_path / "a.pt", WIDE))
    assert started(tmp_path, path, rank=4, alpha=2).rank == 4
    assert "adapter.rank(3) but" in refused(tmp_path, path, rank=3)
    message = refused(tmp_path, path, alpha=8)
    assert "adapter.alpha(8) but" in message and "a.pt states 2; set adapter.alpha: 2, or remove it" in message


def test_a_file_that_states_no_alpha_starts_as_it_generates(tmp_path):
    """Scale 1 unless the section says another one, whatever rank a LoRA from nothing would have."""
    tensors = {f"{name}.lora_{side}.weight": t for name, layer in WIDE.layers.items() for side, t in (("A", layer.a_RI), ("B", layer.b_OR))}
    torch.save(tensors, tmp_path / "silent.pt")
    assert started(tmp_path, str(tmp_path / "silent.pt")).alpha == 4.0
    assert started(tmp_path, str(tmp_path / "silent.pt"), alpha=8).alpha == 8.0


UNEVEN = "alpha / rank of 0.5 to 1.5"


@pytest.mark.parametrize(("other", "alpha", "said", "rank"), [(STEEP, 8, UNEVEN, 4), (STEEP, None, UNEVEN, 4), (NARROW, None, "ranks 2 to 4", 2)])
def test_layers_that_differ_are_refused_with_a_remedy_that_helps(tmp_path, other, alpha, said, rank):
    path = str(write_lora(tmp_path / "mixed.safetensors", replace(WIDE, layers=WIDE.layers | other.layers), "kohya"))
    message = refused(tmp_path, path, alpha=alpha)
    assert f"mixed.safetensors has layers with {said}" in message and message.endswith(f"longlive export {path} OUT --rank {rank}")
    assert run(app, ["export", path, str(tmp_path / "even.pt"), "--rank", str(rank), "--dtype", "fp32"]) == 0
    found = started(tmp_path, str(tmp_path / "even.pt"))
    assert found.rank == found.alpha == rank


def test_layers_of_several_ranks_without_alpha_are_cut_at_the_scale_that_they_generate_with(tmp_path, capsys):
    layers = WIDE.layers | NARROW.layers
    tensors = {f"{name}.lora_{side}.weight": t for name, layer in layers.items() for side, t in (("A", layer.a_RI), ("B", layer.b_OR))}
    path, out = tmp_path / "silent.pt", tmp_path / "even.pt"
    torch.save(tensors, path)
    assert run(app, ["export", str(path), str(out), "--rank", "2", "--alpha", "2", "--dtype", "fp32"]) == 2
    assert "differ in rank and state none" in " ".join(capsys.readouterr().err.split())
    assert run(app, ["export", str(path), str(out), "--rank", "2", "--dtype", "fp32"]) == 0
    for name, layer in started(tmp_path, str(out)).layers.items():
        torch.testing.assert_close(layer.scale * layer.b_OR @ layer.a_RI, (t := replace(layers[name], alpha=None).truncated(2)).b_OR @ t.a_RI)
