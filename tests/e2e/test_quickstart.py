"""The documented Python snippets, in a fresh process, with `compat` on the path and nothing but the device word changed."""

import os
import subprocess
import sys
from pathlib import Path

import documented_places
import pytest
import torch

from longlive.cli.app import run as run_app
from longlive.cli.scripts import save_nvfp4
from longlive.core.errors import CheckpointError, ConfigError, InputError
from longlive.precision.linear import QuantisedLinear

ROOT = Path(__file__).parents[2]

BF16 = '''
import torch
from omegaconf import OmegaConf
from pipeline import CausalDiffusionInferencePipeline
from utils.config import normalize_config
from utils.inference_utils import (
    load_generator_checkpoint,
    place_vae_for_streaming,
    prepare_single_prompt_inputs,
    save_video,
)

prompt = "A compact silver robot walks through a clean robotics lab."
merged_checkpoint_path = "LongLive-2.0-5B/model_bf16.pt"

config = normalize_config(OmegaConf.load("configs/inference.yaml"))
device = torch.device("cuda")
torch.set_grad_enabled(False)

pipe = CausalDiffusionInferencePipeline(config, device=device)
load_generator_checkpoint(pipe.generator, merged_checkpoint_path)
pipe = pipe.to(device=device, dtype=torch.bfloat16)
place_vae_for_streaming(pipe, config)  # honor streaming_vae + vae_device when set
pipe.generator.model.eval().requires_grad_(False)

noise, prompts = prepare_single_prompt_inputs(config, prompt, device)
video = pipe.inference(noise=noise, text_prompts=prompts)
save_video(video[0], "videos/quickstart/sample.mp4", fps=24)
'''

NVFP4 = '''
import torch
from omegaconf import OmegaConf
from pipeline import CausalDiffusionInferencePipeline
from utils.config import normalize_config
from utils.inference_utils import prepare_single_prompt_inputs, save_video, setup_nvfp4_pipeline

prompt = "A compact silver robot walks through a clean robotics lab."

config = normalize_config(OmegaConf.load("configs/nvfp4/inference_nvfp4.yaml"))
device = torch.device("cuda")
torch.set_grad_enabled(False)

pipe = CausalDiffusionInferencePipeline(config, device=device)
setup_nvfp4_pipeline(pipe, config, device)
pipe.generator.model.eval().requires_grad_(False)

noise, prompts = prepare_single_prompt_inputs(config, prompt, device)
video = pipe.inference(noise=noise, text_prompts=prompts)
save_video(video[0], "videos/quickstart/sample_nvfp4.mp4", fps=24)
'''


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return documented_places.write(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture
def compat(monkeypatch):
    """Runs a snippet in this process, with `compat` on the path for as long as the test lasts; returns its names."""
    monkeypatch.syspath_prepend(str(ROOT / "compat"))
    grad = torch.is_grad_enabled()

    def execute(snippet: str, folder: Path) -> dict:
        monkeypatch.chdir(folder)
        names: dict = {}
        exec(snippet.replace('torch.device("cuda")', 'torch.device("cpu")'), names)
        return names

    yield execute
    torch.set_grad_enabled(grad)
    for name in [n for n in sys.modules if n.split(".")[0] in ("pipeline", "utils")]:
        del sys.modules[name]


def run(snippet: str, folder: Path) -> subprocess.CompletedProcess:
    code = snippet.replace('torch.device("cuda")', 'torch.device("cpu")')
    paths = os.pathsep.join([str(ROOT / "compat"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_bf16_quick_start_runs_as_documented(places):
    import av

    checks = """
assert video.shape == (1, 61, 3, 64, 64) and video.dtype == torch.float32, (video.shape, video.dtype)
assert 0 <= video.min() and video.max() <= 1 and video.std() > 0
assert noise.shape == (1, 16, 48, 4, 4)
assert {p.dtype for p in pipe.generator.model.parameters()} == {torch.bfloat16} and pipe.vae.dtype == torch.bfloat16
assert not any(p.requires_grad for p in pipe.generator.model.parameters())
assert not any(name.split(".")[0] == "compat" for name in __import__("sys").modules)
"""
    done = run(BF16 + checks, places)
    assert done.returncode == 0, done.stderr
    with av.open(str(places / "videos/quickstart/sample.mp4")) as film:
        stream = film.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 64, 24)
        assert sum(1 for _ in film.decode(stream)) == 61


@pytest.mark.parametrize("backend, file", [("fouroversix", "model_4o6.pt"), ("fouroversix", "model_4o6.safetensors"), ("transformer_engine", "model_te.pt")])
def test_nvfp4_quick_start_runs_as_documented_on_an_export(places, compat, capsys, monkeypatch, backend, file):
    """The export by the documented script, then the documented snippet with the file named in the configuration."""
    monkeypatch.chdir(places)
    documented = (ROOT / "configs" / "nvfp4" / "inference_nvfp4.yaml").read_text()
    text = documented.replace("[1, 384, 48, 44, 80]", "[1, 16, 48, 4, 4]").replace("/path/to/longlive2/model_4o6.pt", f"LongLive-2.0-5B/{file}")
    assert text != documented
    if backend == "transformer_engine":  # which this machine lacks: the documented way round
        key = "model_quant_use_transformer_engine"
        text = text.replace(f"{key}: false", f"{key}: true\nmodel_quant_te_fallback_to_fouroversix: true")
    folder = places / "configs" / "nvfp4"
    folder.mkdir(exist_ok=True)
    (folder / "inference_nvfp4.yaml").write_text(text)
    flags = ["--config_path", "configs/nvfp4/inference_nvfp4.yaml", "--generator_ckpt", "LongLive-2.0-5B/model_bf16.pt", "--backend", backend]
    assert run_app(save_nvfp4, [*flags, "--output_path", f"LongLive-2.0-5B/{file}", "--device", "cpu"]) == 0, capsys.readouterr().err
    names = compat(NVFP4, places)
    video, pipe = names["video"], names["pipe"]
    assert video.shape == (1, 61, 3, 64, 64) and 0 <= video.min() and video.max() <= 1 and video.std() > 0
    layers = [m for m in pipe.generator.model.modules() if isinstance(m, QuantisedLinear)]
    assert len(layers) == 20 and (places / "videos/quickstart/sample_nvfp4.mp4").stat().st_size > 0
    before = [layer.stored for layer in layers]
    pipe.to(dtype=torch.bfloat16)
    assert all(mine.codes.equal(theirs.codes) and mine.amax.equal(theirs.amax) for mine, theirs in zip(before, (layer.stored for layer in layers)))


def test_nvfp4_without_model_quant_is_refused(places, compat):
    snippet = NVFP4.replace("configs/nvfp4/inference_nvfp4.yaml", "configs/inference.yaml")
    with pytest.raises(ConfigError, match="model_quant: false; set it to true, or use the BF16 quick start"):
        compat(snippet, places)


def test_a_missing_checkpoint_names_the_file(places, compat):
    with pytest.raises(CheckpointError, match="model_bf61.pt"):
        compat(BF16.replace("model_bf16.pt", "model_bf61.pt"), places)


@pytest.mark.parametrize(
    "prompts, films",
    [
        ("a", [["a", "a"]]),
        (["a"], [["a", "a"]]),
        (["a", "b"], [["a", "b"]]),
        ([["a", "b"]], [["a", "b"]]),
        ([["a"], ["b"]], [["a", "b"]]),
    ],
)
def test_prompts_of_one_film_of_two_chunks(places, compat, prompts, films):
    assert compat("from pipeline import chunk_prompts", places)["chunk_prompts"](prompts, 1, 2) == films


def test_prompts_that_do_not_fit_are_refused(places, compat):
    with pytest.raises(InputError, match="3 prompts for 1 films of 2 chunks"):
        compat("from pipeline import chunk_prompts", places)["chunk_prompts"](["a", "b", "c"], 1, 2)
