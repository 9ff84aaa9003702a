"""Adapters that a configuration names, on the way to films: merged or live, one or several, and the script that merges."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_pipeline import SPEC, Letters

from longlive.cli.app import run
from longlive.cli.scripts import merge_lora
from longlive.config import default_config, load_config
from longlive.config.show import config_yaml
from longlive.core.errors import CheckpointError, ConfigError
from longlive.core.geometry import Geometry
from longlive.core.log import warn_once
from longlive.core.story import Shot, Storyboard
from longlive.engine import parts
from longlive.engine.adapters import configured_adapters
from longlive.engine.naming import film_tag
from longlive.engine.pipeline import Pipeline
from longlive.engine.rollout import RolloutSettings
from longlive.engine.session import Request
from longlive.models.lora import Adapter, LoraLayer, LoraStack, attach, branches
from longlive.models.lora_files import write_lora
from longlive.models.shipped import asset
from longlive.models.spec import TINY
from longlive.models.wan_dit import WanDiT
from longlive.models.weights import read_state, save_state

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path):
    """base.safetensors, few.pt (rank 4, no alpha: published), style.safetensors (rank 2, alpha 6: kohya)."""
    torch.manual_seed(0)
    dit = WanDiT(SPEC.dit)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    save_state(tmp_path / "base.safetensors", dit.state_dict())
    attach(dit, TINY, rank=4)
    layers = {name: LoraLayer(a_RI=b.a.detach(), b_OR=0.2 * torch.randn(b.b.shape)) for name, b in branches(dit)}
    published = {f"base_model.model.{n}.lora_{side}.weight": t for n, layer in layers.items() for side, t in (("A", layer.a_RI), ("B", layer.b_OR))}
    torch.save({"generator_lora": published}, tmp_path / "few.pt")
    style = {n: LoraLayer(a_RI=layer.a_RI[:2], b_OR=layer.b_OR[:, :2], alpha=6.0) for n, layer in layers.items() if "ffn" in n}
    write_lora(tmp_path / "style.safetensors", Adapter(name="style", layers=style), "kohya")
    return tmp_path


def config(files, *words, lora="few.pt"):
    names = [str(files / name) for name in (lora if isinstance(lora, list) else [lora] if lora else [])]
    given = [f"checkpoints.lora_ckpt={json.dumps(names if len(names) > 1 else names[0])}"] if names else []
    return default_config("tiny", [f"checkpoints.generator_ckpt={files / 'base.safetensors'}", "adapter={}", *given, *words])


def loaded(settings, dtype=torch.float32):
    return parts.load_dit(settings, TINY, CPU, dtype)[0]


def pipeline(dit):
    geometry, settings = Geometry(32, 64), RolloutSettings(chunk_frames=2, window_frames=8, sink_frames=2, steps=2)
    return Pipeline(spec=SPEC, dit=dit, codec=None, text_encoder=Letters(), geometry=geometry, settings=settings)


def film(dit, before_chunk=lambda pipe, index: None, chunks=3):
    pipe = pipeline(dit)
    session = pipe.session(Request(storyboards=(Storyboard(shots=(Shot(prompt="a red circle", chunks=chunks),)),), decode=False))
    made = []
    for index in range(chunks):
        before_chunk(pipe, index)
        made.append(next(session).latents_BFCHW)
    return torch.stack(made)


def test_live_and_merged_make_the_same_film_and_another_one_than_the_base(files):
    live, merged, base = (film(loaded(c)) for c in (config(files), config(files, "merge_lora=true"), config(files, "adapter.weight=0")))
    torch.testing.assert_close(live, merged, rtol=1e-3, atol=1e-4)
    plain = film(loaded(default_config("tiny", [f"checkpoints.generator_ckpt={files / 'base.safetensors'}"])))
    assert torch.equal(base, plain) and (live - plain).abs().max() > 0.01


def test_a_list_stacks_several_with_a_weight_each(files):
    dit = loaded(config(files, "adapter.weight=[1, 0.5]", lora=["few.pt", "style.safetensors"]))
    assert LoraStack(dit).weights == {"few": 1.0, "style": 0.5}
    scales = {branch.adapter: branch.alpha / branch.a.shape[0] for _, branch in branches(dit)}
    assert scales == {"few": 1.0, "style": 3.0}  # the file that states its alpha keeps it
    merged = loaded(config(files, "adapter.weight=[1, 0.5]", "merge_lora=true", lora=["few.pt", "style.safetensors"]))
    torch.testing.assert_close(film(dit), film(merged), rtol=1e-3, atol=1e-4)
    twice = LoraStack(loaded(config(files, "adapter.weight=0.25", lora=["few.pt", "few.pt"])))
    assert twice.weights == {"few": 0.25, "few-2": 0.25}


def test_a_weight_moves_while_a_film_is_made(files):
    dit = loaded(config(files))

    def fade(pipe, index):
        pipe.lora.set_weight("few", 0.0 if index == 0 else 1.0)

    made, base, full = film(dit, fade), film(loaded(config(files, "adapter.weight=0"))), film(loaded(config(files)))
    assert torch.equal(made[0], base[0])
    assert (made[1] - base[1]).abs().max() > 1e-3 and (made[1] - full[1]).abs().max() > 1e-5


def test_rank_and_alpha_speak_for_files_that_state_none(files):
    def scale(*words, lora="few.pt"):
        return {b.alpha / b.a.shape[0] for _, b in branches(loaded(config(files, *words, lora=lora)))}

    assert scale() == {1.0}
    assert scale("adapter.rank=4", "adapter.alpha=8.0") == {2.0}
    with pytest.raises(ConfigError, match=r"adapter.rank\(16\) but .*few.pt has rank 4; set adapter.rank: 4"):
        scale("adapter.rank=16")
    assert scale("adapter.alpha=8.0") == {2.0}
    with pytest.raises(ConfigError, match=r"adapter.alpha\(8\) but .*style.safetensors states its own \(alpha / rank = 3\)"):
        scale("adapter.alpha=8.0", lora="style.safetensors")
    with pytest.raises(ConfigError, match=r"adapter.rank\(4\) but .*style.safetensors has rank 2"):
        scale("adapter.rank=4", lora="style.safetensors")
    assert scale("adapter.rank=4", lora=["few.pt", "style.safetensors"]) == {1.0, 3.0}  # the section is for the file that states none
    shown = load_config(yaml.safe_load(config_yaml(config(files))))
    assert configured_adapters(shown)[0][0].rank == 4  # what `config show` and receipts print loads back
    with pytest.raises(ConfigError, match="adapter.weight has 3 numbers for 1 LoRA files"):
        config(files, "adapter.weight=[1, 2, 3]")


def test_a_container_may_hold_both_and_a_section_without_weights_is_said_to_do_nothing(files, caplog):
    base = read_state(files / "base.safetensors").tensors
    lora = torch.load(files / "few.pt", weights_only=True)["generator_lora"]
    torch.save({"generator": base, "generator_lora": lora}, files / "both.pt")
    both = config(files, f"checkpoints.generator_ckpt={files / 'both.pt'}", lora=None)
    assert torch.equal(film(loaded(both)), film(loaded(config(files))))
    warn_once.cache_clear()
    assert LoraStack(loaded(config(files, lora=None))).weights == {}
    assert "the adapter section has no effect" in caplog.text


def test_names_of_films_and_receipts_know_of_live_adapters(files, monkeypatch):
    assert film_tag(config(files)) == "lora" and film_tag(config(files, "merge_lora=true")) == "regular"
    monkeypatch.setattr(parts, "load_codec", lambda *args: (None, files / "base.safetensors"))
    monkeypatch.setattr(parts, "load_text_encoder", lambda *args: (Letters(), None))
    pipe = Pipeline.load(config(files, lora=["few.pt", "style.safetensors"]))
    assert pipe.weights["lora.few"] == str(files / "few.pt") and pipe.weights["lora.style"] and pipe.tag == "lora"
    assert list(pipe.lora.weights) == ["few", "style"]


def script(files, *words):
    given = {"model_kwargs": {"model_name": "tiny"}, "checkpoints": {"generator_ckpt": str(files / "base.safetensors")}}
    (files / "config.yaml").write_text(yaml.safe_dump(given))
    return run(merge_lora, ["--config_path", str(files / "config.yaml"), *words])


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_the_script_merges_and_its_file_takes_no_lora(files, capsys, ending):
    out = files / f"merged{ending}"
    words = ["--output_path", str(out), "--lora_ckpt", str(files / "few.pt"), "--device", "cpu"]
    assert script(files, *words, "--dtype", "fp32") == 0
    assert f"wrote {out}" in capsys.readouterr().out
    merged = default_config("tiny", [f"checkpoints.generator_ckpt={out}"])
    torch.testing.assert_close(film(loaded(merged)), film(loaded(config(files))), rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="already has a LoRA merged into it and lora_ckpt is .*few.pt; remove lora_ckpt and the adapter section"):
        loaded(config(files, f"checkpoints.generator_ckpt={out}"))
    assert script(files, *words) == 2 and "exists" in capsys.readouterr().err
    again = ["--output_path", str(files / f"twice{ending}"), "--generator_ckpt", str(out), "--lora_ckpt", str(files / "few.pt"), "--device", "cpu"]
    assert script(files, *again) == 2
    assert "already has a LoRA merged" in capsys.readouterr().err and not (files / f"twice{ending}").exists()


def test_the_script_says_what_is_wrong_in_one_line(files, capsys):
    save_state(files / "other.safetensors", {f"{n}.lora_{s}.weight": torch.zeros(2, 2) for n in ("blocks.0.ffn.0",) for s in "AB"})
    out = ["--output_path", str(files / "out.pt"), "--device", "cpu"]
    for words, said in (
        ([], "there is no LoRA to merge"),
        (["--lora_ckpt", str(files / "other.safetensors")], "was made for another model"),
        (["--lora_ckpt", str(files / "few.pt"), "--dtype", "fp16"], "fp16"),
        (["--lora_ckpt", str(files / "few.pt"), "--device", "cuda:99"], "this machine has"),
        (["--lora_ckpt", str(files / "few.pt"), "--output_path", str(files / "out.zip")], "end it with .pt or .safetensors"),
    ):
        assert script(files, *out, *words) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error, error
    assert not (files / "out.pt").exists()


def test_a_lora_of_another_model_stops_loading(files):
    save_state(files / "other.safetensors", {f"blocks.0.ffn.0.lora_{s}.weight": torch.zeros(2, 2) for s in "AB"})
    for words in ([], ["merge_lora=true"]):
        with pytest.raises(CheckpointError, match="blocks.0.ffn.0 is 2 -> 2 in the LoRA and 32 -> 64 in the model"):
            loaded(config(files, *words, lora="other.safetensors"))


@pytest.mark.parametrize("steps", [2, 4])
def test_shipped_adapters_serve_by_their_names(steps):
    config = load_config(ROOT / "configs" / "tiny" / f"inference_{steps}steps.yaml")
    assert (config.inference.sampling_steps, config.inference.guidance_scale) == (steps, 1.0)
    ((adapter, weight),) = configured_adapters(config)
    assert weight == 1.0 and adapter.path == asset(f"lora-{steps}steps.safetensors")
    few, plain = loaded(config), loaded(default_config("tiny"))
    layer = adapter.layers["blocks.3.ffn.0"]
    added = few.blocks[3].ffn[0].weight - plain.blocks[3].ffn[0].weight
    torch.testing.assert_close(added, (layer.scale * layer.b_OR.float() @ layer.a_RI.float()), rtol=1e-2, atol=1e-5)


def test_a_misspelt_name_of_a_shipped_adapter_is_recognised():
    with pytest.raises(CheckpointError, match="did you mean tiny-4steps, which ships?"):
        configured_adapters(default_config("tiny", ["checkpoints.lora_ckpt=tiny-4step", "adapter={}"]))
