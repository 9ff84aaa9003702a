"""inference.py on checkpoints in the documented places: every prompt on exactly one rank, films that do not depend on the ranks."""

import json
import sys
from pathlib import Path

import documented_places
import pytest
import torch

from longlive.cli.app import run
from longlive.cli.entry import inference, inference_sp

ROOT = Path(__file__).parents[2]
PROMPTS = ["A red circle bounces.", "a robot / with \"quotes\": 100%", "Ein Roboter läuft. 机器人走路"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = documented_places.write(tmp_path_factory.mktemp("inference"))
    (root / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return root


def films(folder: Path) -> dict[str, torch.Tensor]:
    return {p.name: torch.load(p, weights_only=True) for p in sorted(folder.glob("*.pt"))}


def infer(monkeypatch, places, folder, *words, rank=0, world=1):
    monkeypatch.chdir(places)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    small = ["data.data_path=prompts.txt", f"output_folder={folder}", "sampling_steps=2", "save_latents_only=true"]
    return run(inference, ["--config_path", "configs/inference.yaml", *words, *small])


@pytest.mark.parametrize("world", [2, 5])
def test_every_prompt_is_made_once_and_alike_on_any_number_of_ranks(monkeypatch, places, tmp_path, world):
    assert infer(monkeypatch, places, tmp_path / "one") == 0
    alone = films(tmp_path / "one")
    assert len(alone) == len(PROMPTS)
    for rank in range(world):
        assert infer(monkeypatch, places, tmp_path / "many", rank=rank, world=world) == 0
    many = films(tmp_path / "many")
    assert [name.split("-")[0] for name in many] == sorted(f"rank{i % world}" for i in range(len(PROMPTS)))
    by_prompt = {name.partition("-")[2]: z for name, z in many.items()}
    assert set(by_prompt) == {name.partition("-")[2] for name in alone}
    for name, z in alone.items():
        assert z.shape == (16, 48, 4, 4)
        torch.testing.assert_close(by_prompt[name.partition("-")[2]], z, rtol=0, atol=0)


def test_the_python_snippet_makes_the_film_of_the_script(monkeypatch, places, tmp_path):
    assert infer(monkeypatch, places, tmp_path / "one") == 0
    monkeypatch.syspath_prepend(str(ROOT / "compat"))
    from pipeline import CausalDiffusionInferencePipeline
    from utils.config import normalize_config
    from utils.inference_utils import prepare_single_prompt_inputs

    config = normalize_config("configs/inference.yaml").with_overrides(["sampling_steps=2"])
    pipe = CausalDiffusionInferencePipeline(config, device="cpu")
    noise, prompts = prepare_single_prompt_inputs(config, PROMPTS[0], "cpu")
    _, z = pipe.inference(noise=noise, text_prompts=prompts, return_latents=True)
    for name in [n for n in sys.modules if n.split(".")[0] in ("pipeline", "utils")]:
        del sys.modules[name]
    from_script = next(z for name, z in films(tmp_path / "one").items() if "red circle" in name)
    torch.testing.assert_close(z[0], from_script.float(), rtol=0, atol=2**-6)


def test_films_are_not_overwritten_unless_asked(monkeypatch, places, tmp_path, capsys):
    assert infer(monkeypatch, places, tmp_path, "inference_iter=0") == 0
    assert len(films(tmp_path)) == 1
    assert infer(monkeypatch, places, tmp_path, "inference_iter=0") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert infer(monkeypatch, places, tmp_path, "--overwrite", "inference_iter=0") == 0


@pytest.mark.parametrize(
    "words, part",
    [
        (["--use_te_quant", "--no_use_te_quant"], "exclude each other"),
        (["--use_te_quant"], "model_quant: false"),
        (["--use_te_quant", "model_quant=true"], "TransformerEngine is not installed"),
        (["sp_size=2"], "sp_size(2) x dp_size(1)"),
        (["checkpoints.generator_ckpt=nowhere.pt"], "nowhere.pt"),
        (["num_output_frames=12"], "num_output_frames(12) % num_frame_per_block(8) = 4"),
        (["inference.vae_type=mg_lightvae"], "MG-LightVAE.pth"),
    ],
)
def test_bad_input_is_refused_in_one_line(monkeypatch, places, tmp_path, capsys, words, part):
    assert infer(monkeypatch, places, tmp_path / "films", *words) == 2
    err = capsys.readouterr().err.strip()
    assert part in err and "\n" not in err
    assert not (tmp_path / "films").exists()


@pytest.mark.parametrize(
    "words, part",
    [
        ([], "sp_size(4) x dp_size(1) = 4 != WORLD_SIZE(1); launch 4 processes (torchrun --nproc_per_node=4)"),
        (["sp_size=8", "model_num_heads=4"], "model_num_heads(4) % sp_size(8) = 4, not 0"),
        (["inference.cuda_graphs=true"], "inference.cuda_graphs(true) with sp_size(4)"),
        (["inference.device=cuda:0"], "one card for sp_size(4) x dp_size(1) processes"),
    ],
)
def test_the_sp_script_refuses_what_ranks_cannot_share(monkeypatch, capsys, words, part):
    monkeypatch.chdir(ROOT)
    assert run(inference_sp, ["--config_path", "configs/inference_sp.yaml", *words]) == 2
    err = capsys.readouterr().err.strip()
    assert part in err and "\n" not in err


def test_a_receipt_names_the_weights(monkeypatch, places, tmp_path):
    assert infer(monkeypatch, places, tmp_path, "inference_iter=0") == 0
    receipt = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))
    assert set(receipt["weights"]) == {"generator", "vae", "text_encoder"}
    assert receipt["config"]["inference"]["sampling_steps"] == 2
