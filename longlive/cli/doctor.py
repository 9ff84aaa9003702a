"""`longlive doctor`: what this machine can run, what is missing and how to get it, and where weights belong.

Each check returns `Finding`s. A finding is ok, a note (something optional is absent), or broken (nothing works without it: exit code 1).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Iterator

import typer

from ..core.errors import CheckFailed
from ..models.spec import VAE_TYPES

OK, NOTE, BROKEN = "ok", "note", "broken"
GIGA = 10**9
WAN_FETCH = "hf download Wan-AI/Wan2.2-TI2V-5B --local-dir wan_models/Wan2.2-TI2V-5B"
LONG_FETCH = "hf download Efficient-Large-Model/LongLive-2.0-5B --local-dir LongLive-2.0-5B"
LIGHT_FETCH = "hf download Skywork/Matrix-Game-3.0 {} --local-dir wan_models/Matrix-Game-3.0"

# place (a glob, relative to the working directory), what it is, how to get it
WEIGHTS = (
    ("wan_models/Wan2.2-TI2V-5B/diffusion_pytorch_model*.safetensors", "Wan2.2-TI2V-5B transformer", WAN_FETCH),
    (VAE_TYPES["wan"].path, "Wan2.2 VAE", WAN_FETCH),
    ("wan_models/Wan2.2-TI2V-5B/models_t5_umt5-xxl-enc-bf16.pth", "UMT5-XXL text encoder", WAN_FETCH),
    ("wan_models/Wan2.2-TI2V-5B/google/umt5-xxl/*", "UMT5-XXL tokenizer", WAN_FETCH),
    ("LongLive-2.0-5B/model_bf16.pt", "LongLive 2.0 generator", LONG_FETCH),
    *((kind.path, f"decoder for vae_type: {name}", LIGHT_FETCH.format(Path(kind.path).name)) for name, kind in VAE_TYPES.items() if kind.rate),
)

# module -> (what for, required)
MODULES = {
    "torch": ("everything", True),
    "numpy": ("everything", True),
    "safetensors": ("weights", True),
    "pydantic": ("configuration", True),
    "av": ("video files", True),
    "PIL": ("images", True),
    "transformers": ("the text encoder of the 5B model", False),
    "sentencepiece": ("the tokenizer of the 5B model", False),
    "ftfy": ("cleaning prompts for the 5B model", False),
    "peft": ("LoRA", False),
    "omegaconf": ("the documented Python snippets (extra: compat)", False),
    "tensorboard": ("training curves (extra: train)", False),
}
DISTRIBUTIONS = {"PIL": "pillow"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` says what to do, "" when nothing is needed."""

    area: str
    state: str
    text: str
    fix: str = ""


def register(app: typer.Typer) -> None:
    """Adds the `doctor` command to the application."""
    app.command("doctor")(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Say what this machine can run, what is missing with the fix, and where weights belong."""
    findings = [*machine(), *packages(), *devices(), *video(), *weights(Path.cwd()), *models()]
    if as_json:
        typer.echo(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{finding.state:<7}{finding.area:<10}{finding.text}" + (f"  ->  {finding.fix}" if finding.fix else ""))
    broken = [f for f in findings if f.state == BROKEN]
    if broken:
        raise CheckFailed(f"{len(broken)} required thing{'s are' if len(broken) > 1 else ' is'} broken: {'; '.join(f.text for f in broken)}")


def machine() -> Iterator[Finding]:
    """Python, processors, memory, disk."""
    version = platform.python_version()
    if sys.version_info >= (3, 11):
        yield Finding("python", OK, f"Python {version} on {platform.system()} {platform.machine()}")
    else:
        yield Finding("python", BROKEN, f"Python {version}", "use Python 3.11 or newer")
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    cores = len(psutil.Process().cpu_affinity()) if platform.system() == "Linux" else psutil.cpu_count()
    yield Finding("machine", OK, f"{cores} cores, {memory.total / GIGA:.0f} GB memory ({memory.available / GIGA:.0f} free)")
    small = disk.free < 2 * GIGA
    yield Finding("disk", NOTE if small else OK, f"{disk.free / GIGA:.0f} GB free here", "free some space for films" if small else "")


def packages() -> Iterator[Finding]:
    """Python packages, required and optional."""
    for module, (purpose, required) in MODULES.items():
        name = DISTRIBUTIONS.get(module, module)
        if importlib.util.find_spec(module) is None:
            yield Finding("package", BROKEN if required else NOTE, f"{name} is missing, for {purpose}", f"pip install {name}")
        else:
            yield Finding("package", OK, f"{name} {importlib.metadata.version(name)}")


def devices() -> Iterator[Finding]:
    """The devices that torch sees."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        fix = "install a CUDA build of torch" if built is None and shutil.which("nvidia-smi") else ""
        yield Finding("device", NOTE if fix else OK, f"CPU only (torch {torch.__version__}, {torch.get_num_threads()} threads)", fix)
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        formats = ["bf16"] + ["FP8"] * ((about.major, about.minor) >= (8, 9)) + ["NVFP4"] * (about.major >= 10)
        size = f"compute capability {about.major}.{about.minor}, {about.total_memory / GIGA:.0f} GB"
        yield Finding("device", OK, f"cuda:{index} {about.name}, {size}, {'/'.join(formats)} units")
    if importlib.util.find_spec("triton") is None:
        yield Finding("device", NOTE, "triton is missing, for fused kernels", "pip install triton")


def video() -> Iterator[Finding]:
    """Whether films can be encoded."""
    if importlib.util.find_spec("av") is None:
        return
    import av

    if "libx264" in av.codecs_available:
        yield Finding("video", OK, "H.264 encoder libx264")
    else:
        yield Finding("video", BROKEN, "PyAV has no libx264 encoder", "pip install --force-reinstall av (its wheels bring one)")


def weights(root: Path) -> Iterator[Finding]:
    """Where weights belong, and whether they are there. None of them is needed for the small model."""
    for place, what, fix in WEIGHTS:
        found = [p for p in root.glob(place) if p.is_file()]
        size = sum(p.stat().st_size for p in found)
        empty = any(p.stat().st_size == 0 for p in found)
        if found and not empty:
            yield Finding("weights", OK, f"{place} ({what}, {size / GIGA:.2f} GB)")
        else:
            yield Finding("weights", NOTE, f"{place} is {'empty' if empty else 'not there'} ({what})", fix)


def models() -> Iterator[Finding]:
    """Which of the models can run here."""
    from ..models.spec import WAN22_TI2V_5B

    assets = Path(__file__).parents[1] / "assets" / "tiny"
    if list(assets.glob("dit-*.safetensors")) and (assets / "vae.safetensors").is_file():
        yield Finding("model", OK, 'tiny runs here: longlive generate "a red circle bounces on a meadow"')
    else:
        yield Finding("model", BROKEN, "the weights of tiny are not in the package", "reinstall it, or check out the repository with its assets")
    memory, cache = _dit_bytes(WAN22_TI2V_5B.dit), _cache_bytes(WAN22_TI2V_5B)
    need = f"in bf16 its weights take {memory / GIGA:.1f} GB and its KV cache {cache / GIGA:.1f} GB, before activations and the VAE"
    have = all(any(p.is_file() for p in Path.cwd().glob(place)) for place, _, _ in WEIGHTS[:4])
    yield Finding("model", OK if have else NOTE, f"{WAN22_TI2V_5B.name}: {need}", "" if have else "fetch its weights (see above)")


def _dit_bytes(d) -> int:
    block = 8 * d.dim * d.dim + 2 * d.dim * d.ffn
    return 2 * (d.layers * block + 6 * d.dim * d.dim + d.text_dim * d.dim + 2 * d.dim * d.dim)


def _cache_bytes(spec) -> int:
    from ..core.geometry import CHUNK_FRAMES, Geometry

    tokens = spec.window_chunks * CHUNK_FRAMES * Geometry(spec.height, spec.width).frame_tokens
    return 2 * 2 * spec.dit.layers * tokens * spec.dit.dim
