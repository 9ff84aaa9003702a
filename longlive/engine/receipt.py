"""The receipt beside each film: everything that is needed to make it again, and how long it took.

One JSON file per film: the resolved configuration, seed, prompt index and sample (the identity of the noise), the storyboard as it was
shown, the hash of the weights, versions and hardware, and timings. `file` is relative to the receipt.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field

import torch

from .. import __version__
from ..core.geometry import FPS, pixel_frames
from ..core.story import ChunkPlan, Storyboard


@dataclass
class Timings:
    """Seconds of one film's making, added up chunk by chunk; the list holds (denoise, total) per chunk."""

    load: float = 0.0
    chunks: list[tuple[float, float]] = field(default_factory=list)

    def add(self, seconds: dict[str, float]) -> None:
        self.chunks.append((seconds["denoise"], seconds["total"]))

    def summary(self, frames: int) -> dict:
        """`frames` in all samples of the batch. Rates are None for an empty film."""
        denoise, total = (sum(c[i] for c in self.chunks) for i in (0, 1))
        return {
            "load_seconds": round(self.load, 3),
            "first_chunk_seconds": round(self.chunks[0][1], 3) if self.chunks else None,
            "denoise_seconds": round(denoise, 3),
            "total_seconds": round(total, 3),
            "denoise_frames_per_second": round(frames / denoise, 2) if denoise else None,
            "frames_per_second": round(frames / total, 2) if total else None,
            "chunks": [{"denoise": round(d, 4), "total": round(t, 4)} for d, t in self.chunks],
        }


def versions(device: torch.device) -> dict[str, str]:
    """Software and hardware, in words."""
    import av

    found = {"longlive": __version__, "python": platform.python_version(), "torch": torch.__version__, "av": av.__version__}
    if device.type == "cuda":
        return {**found, "cuda": str(torch.version.cuda), "device": torch.cuda.get_device_name(device)}
    return {**found, "device": f"cpu, {platform.machine()}, {torch.get_num_threads()} threads"}


def shown(board: Storyboard, plans: list[ChunkPlan]) -> dict:
    """The storyboard as it was filmed: one entry per shot, with the chunks that it really got."""
    shots = []
    for plan in plans:
        if not shots or plan.cut:
            shots.append({"prompt": plan.prompt, "chunks": 0})
        shots[-1]["chunks"] += 1
    given = {key: value for key, value in (("title", board.title), ("image", board.image), ("video", board.video)) if value}
    return {"name": board.name, **given, "shots": shots}


def receipt_text(
    *, config: dict, board: Storyboard, plans: list[ChunkPlan], seed: int, index: int, sample: int, samples: int, pipeline, hashes: dict[str, str],
    timings: Timings, file: str, interrupted: bool
) -> str:  # fmt: skip
    """The receipt as JSON text. `config` is the resolved configuration as plain values, `hashes` part -> hash of its weights."""
    frames = pixel_frames(len(plans) * pipeline.settings.chunk_frames)
    record = {
        "file": file,
        "complete": not interrupted,
        "film": {
            "chunks": len(plans),
            "latent_frames": len(plans) * pipeline.settings.chunk_frames,
            "frames": frames,
            "fps": FPS,
            "seconds": round(frames / FPS, 3),
            "height": pipeline.geometry.height,
            "width": pipeline.geometry.width,
        },
        "noise": {"seed": seed, "prompt_index": index, "sample": sample},
        "storyboard": shown(board, plans),
        "model": pipeline.spec.name,
        "precision": str(pipeline.dtype).removeprefix("torch."),
        "weights": hashes,
        "versions": versions(pipeline.device),
        "timings": {"samples_in_batch": samples, **timings.summary(frames * samples)},
        "config": config,
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"
