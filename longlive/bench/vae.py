"""Where the time of decoding a chunk goes: every convolution by its shape, norms, and the rest; with cuDNN's own choice of kernels and with its measured one.

The decoder is the real one: a `Spatial` strategy times each convolution that it hands on, a `pointwise` times each norm. What is left of the whole are
residual sums, doubled frames, copies and attention.

Legend: T frames, H W rows and columns, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..core.geometry import CHUNK_FRAMES, Geometry
from ..engine.decode import Inline
from ..models.vae_fp8 import Fp8DoublingConv, Fp8Weight
from ..models.wan_vae import WHOLE_FRAME, DoublingConv, WholeFrame
from ..ops.frames import norm_silu
from .fused import device_rates
from .networks import RandomNetworks
from .record import Record, surroundings
from .timing import by_kind, kernels, synchronize, timed

NORM = "norm, silu"


@dataclass(frozen=True, kw_only=True)
class VaeSettings:
    """`groups`: latent frames per call of the decoder, each measured; 0 = the codec's own choice. `tile_rows`: latent rows of a tile, 0 = whole frames."""

    model: str = "wan2.2-ti2v-5b"
    vaes: tuple[str, ...] = ("wan",)
    groups: tuple[int, ...] = (0,)
    height: int | None = None
    width: int | None = None
    tile_rows: int = 0
    repeats: int = 5


@dataclass
class Span:
    """Calls of one kind: events around each, and what they did."""

    calls: list[tuple] = field(default_factory=list)
    operations: float = 0.0
    moved: int = 0


class Timed(WholeFrame):
    """Times convolutions and norms on their way, without waiting. What else a strategy does is left to `inner`."""

    def __init__(self, device: torch.device, inner: WholeFrame = WHOLE_FRAME):
        self.device, self.inner, self.spans = device, inner, {}

    def by_rows(self, *work) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.inner.by_rows(*work)

    def convolve(self, conv, x_BTHWC: torch.Tensor, **options) -> torch.Tensor:
        doubling = isinstance(conv, (DoublingConv, Fp8DoublingConv))
        outputs, inputs, *size = conv.sizes
        kind = ("fp8 " if isinstance(conv, Fp8Weight) else "") + ("doubling " if doubling else "")
        name = f"{kind}{'x'.join(map(str, size))} {inputs}->{outputs} on {_size(x_BTHWC)}"
        y = self._timed(name, lambda: WholeFrame.convolve(self, conv, x_BTHWC, **options))
        positions = y[..., 0].numel()
        taps = inputs * math.prod(size) * 4 // 9 if doubling else inputs * math.prod(size)
        self.spans[name].operations += 2.0 * positions * taps * outputs
        self.spans[name].moved += x_BTHWC.nbytes + y.nbytes
        return y

    def norm(self, x_BTHWC: torch.Tensor, gamma: torch.Tensor, past_BPHWC: torch.Tensor | None = None, bias: torch.Tensor | None = None) -> torch.Tensor:
        name = f"{NORM} {_size(x_BTHWC)} x {x_BTHWC.shape[-1]}"
        y = self._timed(name, lambda: norm_silu(x_BTHWC, gamma, past_BPHWC, bias))
        self.spans[name].moved += x_BTHWC.nbytes + y.nbytes + (0 if past_BPHWC is None else past_BPHWC.nbytes)
        return y

    def _timed(self, name: str, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        span = self.spans.setdefault(name, Span())
        if self.device.type != "cuda":
            y, seconds = _kept(work, self.device)
            span.calls.append((seconds,))
            return y
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        y = work()
        last.record()
        span.calls.append((first, last))
        return y

    def rows(self, rates: dict[str, float]) -> list[dict]:
        """An entry per name, longest first. The device must be done."""
        found = []
        for name, span in self.spans.items():
            seconds = sum(call[0] if len(call) == 1 else call[0].elapsed_time(call[1]) / 1000 for call in span.calls)
            floor = max(span.moved / rates["bytes_per_second"], span.operations / rates["operations_per_second"])
            entry = {"what": name, "calls": len(span.calls), "ms": 1000 * seconds, "floor_ms": 1000 * floor, "gb_per_second": span.moved / seconds / 1e9}
            found.append(entry | ({"tflops": span.operations / seconds / 1e12} if span.operations else {}))
        return sorted(found, key=lambda entry: -entry["ms"])


def bench_vae(settings: VaeSettings, path: Path | None, report: Callable[[str], None], *, device: torch.device | None = None) -> list[dict]:
    """Measures every case, reports lines, writes `path` after each; returns the entries."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = None if settings.height is None or settings.width is None else Geometry(settings.height, settings.width)
    networks = RandomNetworks(settings.model, size, device)
    rates = device_rates(device)
    head = {"benchmark": "ops vae", "settings": {k: str(v) for k, v in vars(settings).items()}, "rates": rates}
    where = surroundings(device, 1)
    record = Record(path, {**head, **where})
    for name, value in {**where, **rates, "height": networks.geometry.height, "width": networks.geometry.width}.items():
        report(f"{name:18s} {value}")
    for vae in settings.vaes:
        for group in settings.groups:
            for measured in (False, True) if device.type == "cuda" else (False,):
                record.start({"vae": vae, "group": group, "tile_rows": settings.tile_rows, "cudnn_benchmark": measured})
                with torch.backends.cudnn.flags(enabled=True, benchmark=measured, deterministic=False, allow_tf32=True):
                    record.finish(_decode(networks, (vae, group, settings.tile_rows), settings.repeats, rates, report))
                report(_words(record.rows[-1]))
    return record.rows


def _decode(networks: RandomNetworks, choice: tuple[str, int, int], repeats: int, rates: dict[str, float], report: Callable[[str], None]) -> dict:
    device, g = networks.device, networks.geometry
    vae, group, tile_rows = choice
    codec = networks.codec(vae, "bf16", group, tile_rows)
    shape = (1, CHUNK_FRAMES, codec.vae.dims.z_dim, g.latent_height, g.latent_width)
    z_BFCHW = torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device)
    decoder = Inline(codec)

    def take() -> None:
        for _ in decoder.groups(z_BFCHW):
            pass

    warmup = sum(timed(take, device)[0] for _ in range(2))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = sorted(timed(take, device)[1] for _ in range(repeats))
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    codec.vae.spatial = parts = Timed(device, codec.vae.spatial)
    codec.vae.pointwise = parts.norm
    whole = timed(take, device)[1]
    synchronize(device)
    rows = parts.rows(rates)
    for row in rows:
        rate = f"{row['tflops']:5.0f} TFLOP/s" if "tflops" in row else f"{row['gb_per_second']:5.0f} GB/s   "
        report(f"  {row['ms']:8.2f} ms {row['calls']:3d} x, floor {row['floor_ms']:7.2f}, {rate} {row['what']}")
    codec.vae.spatial, codec.vae.pointwise = parts.inner, norm_silu
    found = by_kind(kernels(take, device))
    return {
        "ms_per_chunk": 1000 * seconds[len(seconds) // 2],
        "warmup_s": warmup,
        "peak_gib": peak,
        "convolutions_ms": sum(row["ms"] for row in rows if "tflops" in row),
        "norms_ms": sum(row["ms"] for row in rows if "tflops" not in row),
        "whole_ms": 1000 * whole,
        "parts": rows,
        "ms_by_kind": {kind: 1000 * value for kind, value in found.items()},
    }


def _kept(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, float]:
    kept = []
    seconds = timed(lambda: kept.append(work()), device)[0]
    return kept[0], seconds


def _size(x_BTHWC: torch.Tensor) -> str:
    return "x".join(map(str, x_BTHWC.shape[1:4]))


def _words(entry: dict) -> str:
    kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in entry["ms_by_kind"].items())
    choice = "measured kernels" if entry["cudnn_benchmark"] else "cuDNN's choice"
    tiles = f", tiles of {entry['tile_rows']} latent rows" if entry["tile_rows"] else ""
    rest = entry["whole_ms"] - entry["convolutions_ms"] - entry["norms_ms"]
    return (
        f"{entry['vae']}, group {entry['group']}{tiles}, {choice}: {entry['ms_per_chunk']:.1f} ms a chunk (convolutions {entry['convolutions_ms']:.1f}, norms "
        f"{entry['norms_ms']:.1f}, rest {rest:.1f}), warm-up {entry['warmup_s']:.1f} s, peak {entry['peak_gib'] or 0:.1f} GiB; ms by kind: {kinds or 'unknown'}"
    )
