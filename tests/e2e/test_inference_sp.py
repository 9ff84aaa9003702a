"""inference_sp.py and longlive generate on several processes, on checkpoints in the documented places: the films of one process, each made once."""

import os
import sys
from pathlib import Path

import documented_places
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

from ranks import _free_port, run_ranks

from longlive.cli.app import app, run
from longlive.cli.entry import inference, inference_sp
from longlive.data.videos import decode_frames

PROMPTS = ["A red circle bounces.", "A robot walks.", "Clean lab."]
WORDS = ["data.data_path=prompts.txt", "sampling_steps=2", "inference.device=cpu", "inference.dtype=float32", "model_num_heads=4"]
SP = ["--config_path", "configs/inference_sp.yaml", *WORDS]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = documented_places.write(tmp_path_factory.mktemp("shared"), heads=4)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return root


def launches(places, port, *launches):
    """Exit codes of launches of this rank, one after the other: (script, words) each, on ports of their own."""
    os.chdir(places)
    found = []
    for number, (script, words) in enumerate(launches):
        os.environ["MASTER_PORT"] = str(port[number])
        found.append(run({"sp": inference_sp, "generate": app}[script], words))
    return found


def films(folder: Path) -> dict[str, torch.Tensor]:
    """Middle part of the name -> latents."""
    return {p.stem.split("-")[1]: torch.load(p, weights_only=True) for p in folder.glob("*.pt")}


def pixels(film: Path) -> torch.Tensor:
    """[T, bytes of a frame]"""
    return torch.stack([torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8) for frame in decode_frames(film)]).float()


def test_films_of_groups_are_those_of_one_process(places, tmp_path, monkeypatch, capfd):
    folders = {name: tmp_path / name for name in ("uneven", "shared", "spread", "one", "generate", "video", "alone")}
    latents = {name: [*SP, f"output_folder={folder}", "save_latents_only=true"] for name, folder in folders.items()}
    three = [("sp", [*latents["uneven"], "sp_size=2", "dp_size=2", "auto_sp_remainder=true"])]
    two = [
        ("sp", [*latents["shared"], "sp_size=2"]),
        ("sp", [*latents["spread"], "sp_size=1", "dp_size=2"]),
        ("sp", [*SP, f"output_folder={folders['video']}", "sp_size=2", "inference_iter=0"]),
        (
            "generate",
            [
                "generate",
                "prompts.txt",
                "--config",
                "configs/inference_sp.yaml",
                "--output",
                str(folders["generate"]),
                *latents["generate"][2:],
                "sp_size=2",
                "num_output_frames=16",
            ],
        ),
        ("sp", [*SP, "sp_size=4"]),
    ]
    assert run_ranks(launches, 3, tmp_path, places, [_free_port()], *three) == [[0]] * 3
    assert run_ranks(launches, 2, tmp_path, places, [_free_port() for _ in two], *two) == [[0, 0, 0, 0, 2]] * 2
    said = capfd.readouterr()
    assert said.err.count("sp_size(4) x dp_size(1) = 4 != WORLD_SIZE(2)") == 2 and "Traceback" not in said.err
    monkeypatch.chdir(places)
    plain = ["--config_path", "configs/inference.yaml", *WORDS]
    assert run(inference, [*plain, f"output_folder={folders['one']}", "save_latents_only=true"]) == 0
    assert run(inference, [*plain, f"output_folder={folders['alone']}", "inference_iter=0"]) == 0
    alone = films(folders["one"])
    assert len(alone) == len(PROMPTS)
    for name in ("uneven", "shared", "spread", "generate"):
        made = films(folders[name])
        assert made.keys() == alone.keys()
        for prompt, z in made.items():
            torch.testing.assert_close(z.float(), alone[prompt].float(), rtol=2**-7, atol=2**-7)
    names = sorted(p.name.split("-")[0] + p.stem.split("-")[-1] for p in folders["uneven"].glob("*.pt"))
    assert names == ["rank00_regular_dp0_sp2", "rank00_regular_dp0_sp2", "rank10_regular"]
    shared, single = (pixels(next(folders[name].glob("*.mp4"))) for name in ("video", "alone"))
    first = (shared - single)[:29].abs()  # of the first chunk: what rounding tips over, the codec's motion search spreads from frame to frame
    assert shared.shape == single.shape and len(shared) == 61 and first.mean() < 0.5
    assert len(list(folders["video"].iterdir())) == 3  # film, prompts, receipt; one of each
