"""Each fused operation against its torch reference and against its floor, at the sizes of a chunk.

The reference is what runs where a gradient is wanted: the same call on an input that wants one; of what has no gradient, the torch code that it equals.
On a GPU a graph of the calls is timed, as generation runs them, since the host takes longer to launch a small kernel than a GPU to run it. Floors come
from the bytes that must be read and written, over the card's measured copy rate, and from multiplications, over its measured matrix rate. (Errors are a
matter of tests/gpu.)

Legend: B = 1, N tokens of a chunk, D features, H heads, d head features, F latent frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..core.geometry import CHUNK_FRAMES, Geometry
from ..models.spec import DiTDims, model_spec
from ..ops.attention import attention
from ..ops.fp8 import quantise_rows
from ..ops.fp8_matmul import quantised_rows
from ..ops.heads import Heads, norm_rope_write
from ..ops.intake import Rows
from ..ops.linear import joint_linear, lay_side_by_side, linear_gelu
from ..ops.modulate import modulate
from ..ops.norm import layer_norm, rms_norm
from ..ops.residual import add_gated, add_norm, add_norm_modulate, norm_modulate
from ..ops.text_attention import text_attention
from ..precision.linear import Fp8Linear
from .record import Record, surroundings
from .timing import recorded

SETS = 3  # of inputs, in turn
ROUNDS = 4  # over all of them, in a measurement


@dataclass(frozen=True, kw_only=True)
class FusedSettings:
    """`window` in latent frames: what self-attention reads; `text`: keys of a prompt."""

    model: str = "wan2.2-ti2v-5b"
    height: int | None = None
    width: int | None = None
    window: int = 32
    text: int = 144
    repeats: int = 20


class Work(NamedTuple):
    """`call(x)` must move so many bytes and do so many operations. `reference(x)`: torch's way, where `call` gives no gradient."""

    call: Callable[[torch.Tensor], object]
    x: torch.Tensor
    moved: int
    operations: float = 0.0
    reference: Callable[[torch.Tensor], object] | None = None


@dataclass(frozen=True)
class Case:
    """`make(tokens, dtype)` is the operation on so many tokens. `reference` False: there is no other way to compute it."""

    name: str
    make: Callable[[int, torch.dtype], Work]
    reference: bool = True


def bench_fused(settings: FusedSettings, path: Path | None, report: Callable[[str], None], *, device: torch.device | None = None) -> list[dict]:
    """Measures every operation, reports a line each, writes `path` after each; returns the entries."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = model_spec(settings.model)
    size = Geometry(settings.height or spec.height, settings.width or spec.width)
    tokens = CHUNK_FRAMES * size.frame_tokens
    rates = device_rates(device)
    timed_what = "one call, on a GPU from a recorded graph; median of the repeats, each of enough calls; inputs rotate among three sets"
    head = {"benchmark": "ops fused", "settings": vars(settings), "rates": rates, "timed": timed_what}
    where = surroundings(device, 1)
    record = Record(path, {**head, **where})
    for name, value in {**where, **rates, "tokens": tokens}.items():
        report(f"{name:18s} {value}")
    for case in [*cases(spec.dit, settings.text, device), *row_cases(spec.dit, device), *library_cases(spec.dit, settings, device)]:
        record.start({"operation": case.name})
        record.finish(_measure(case, tokens, device, rates, settings.repeats))
        report(_line(record.rows[-1]))
    return record.rows


def device_rates(device: torch.device) -> dict[str, float]:
    """Bytes read and written per second by a large copy, and operations per second of a large product in the dtype of generation."""
    large, side = (2**31, 8192) if device.type == "cuda" else (2**24, 256)
    source = torch.randint(255, (large,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device, dtype=_dtype(device))
    copy = recorded(lambda: target.copy_(source), device, 5)
    product = recorded(lambda: matrix @ matrix, device, 5)
    return {"bytes_per_second": 2 * large / copy, "operations_per_second": 2 * side**3 / product}


def cases(dims: DiTDims, text: int, device: torch.device) -> list[Case]:
    """The operations of a block that have a reference."""
    D, d, random = dims.dim, dims.head_dim, _random(device)

    def residual(branch: bool, gated: bool, normed: str | None):
        def run(tokens: int, dtype: torch.dtype):
            x, y = random(1, tokens, D, dtype=dtype), random(1, tokens, D, dtype=dtype)
            rows = random(1, CHUNK_FRAMES, 6, D, dtype=dtype, like=0.5)
            shift, scale, gate, *_ = rows.unbind(2)
            weight = random(D, dtype=dtype)
            calls = {
                (False, False, "modulated"): lambda x: norm_modulate(x, shift, scale, 1e-6),
                (True, True, "affine"): lambda x: add_norm(x, y, gate, weight, weight, 1e-6),
                (True, False, "modulated"): lambda x: add_norm_modulate(x, y, shift, scale, 1e-6),
                (True, True, None): lambda x: add_gated(x, y, gate),
            }
            passes = 1 + 2 * branch + (normed is not None)
            return Work(calls[branch, gated, normed], x, passes * x.nbytes)

        return run

    def write(tokens: int, dtype: torch.dtype):
        heads = random(1, tokens, 3 * D, dtype=dtype)
        angle = random(1, tokens, d // 2, dtype=torch.float32)
        tables, weight = (angle.cos(), angle.sin()), random(D, dtype=dtype)
        pages = [torch.zeros(1, 1, tokens, dims.heads, d, device=device, dtype=dtype) for _ in range(2)]
        slot = torch.zeros(1, dtype=torch.int64, device=device)

        def call(x):
            q, k, v = x.split(D, -1)
            return norm_rope_write(Heads(q, k, v, weight, weight, 1e-6, d), tables, slot, *pages, rotate_k=True)

        return Work(call, heads, 2 * heads.nbytes + 2 * angle.nbytes)

    def rms(tokens: int, dtype: torch.dtype):
        x, weight = random(1, tokens, D, dtype=dtype), random(D, dtype=dtype)
        return Work(lambda x: rms_norm(x, weight, 1e-6), x, 2 * x.nbytes)

    def gelu(tokens: int, dtype: torch.dtype):
        layer = torch.nn.Linear(D, dims.ffn, device=device, dtype=dtype).requires_grad_(False)
        x = random(1, tokens, D, dtype=dtype)
        return Work(lambda x: linear_gelu(x, layer), x, x.nbytes + 2 * D * dims.ffn + 2 * tokens * dims.ffn, 2.0 * tokens * D * dims.ffn)

    def joint(tokens: int, dtype: torch.dtype):
        layers = [torch.nn.Linear(D, D, device=device, dtype=dtype).requires_grad_(False) for _ in range(3)]
        lay_side_by_side(layers)
        x = random(1, tokens, D, dtype=dtype)
        return Work(lambda x: joint_linear(x, *layers), x, 4 * x.nbytes + 6 * D * D, 6.0 * tokens * D * D)

    def read_text(tokens: int, dtype: torch.dtype):
        q = random(1, tokens, dims.heads, d, dtype=dtype)
        k, v = random(2, 1, text, dims.heads, d, dtype=dtype)
        bias, rows = torch.zeros(1, text, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        return Work(lambda q: text_attention(q, k, v, bias, rows), q, 2 * q.nbytes + 2 * k.nbytes, 4.0 * tokens * text * D)

    return [
        Case("attention to the text", read_text),
        Case("norm, modulate", residual(False, False, "modulated")),
        Case("gate, add, norm", residual(True, True, "affine")),
        Case("add, norm, modulate", residual(True, False, "modulated")),
        Case("gate, add", residual(True, True, None)),
        Case("rms q k, rotate, write page", write),
        Case("rms", rms),
        Case("q k v joined", joint),
        Case("linear + gelu", gelu),
    ]


def row_cases(dims: DiTDims, device: torch.device) -> list[Case]:
    """What the FP8 layers of a block read."""
    D, random = dims.dim, _random(device)

    def plain(x: torch.Tensor):
        return quantise_rows(x, on_nonfinite="nan")

    def rows(width: int, make: Callable[[torch.Tensor], object], reference: Callable[[torch.Tensor], object]):
        def run(tokens: int, dtype: torch.dtype):
            x = random(1, tokens, width, dtype=dtype)
            return Work(make, x, x.nbytes + x.numel(), reference=reference)

        return run

    def norm_rows(tokens: int, dtype: torch.dtype):
        x, reader = random(1, tokens, D, dtype=dtype), Fp8Linear.of(random(16, D, dtype=dtype), None)
        shift, scale = random(2, 1, CHUNK_FRAMES, D, dtype=dtype, like=0.5)
        call, reference = lambda x: norm_modulate(x, shift, scale, 1e-6, (reader,)), lambda x: plain(modulate(layer_norm(x, 1e-6), shift, scale))
        return Work(call, x, x.nbytes + x.numel(), reference=reference)

    return [
        Case("fp8 rows", rows(D, quantised_rows, plain)),
        Case("gelu, fp8 rows", rows(dims.ffn, Rows().of_gelu, lambda x: plain(F.gelu(x.float(), approximate="tanh")))),
        Case("norm, modulate, fp8 rows", norm_rows),
    ]


def library_cases(dims: DiTDims, settings: FusedSettings, device: torch.device) -> list[Case]:
    """Products and attention, which the GPU's libraries compute."""
    D, d, random = dims.dim, dims.head_dim, _random(device)

    def linear(inputs: int, outputs: int):
        layer = torch.nn.Linear(inputs, outputs, device=device).requires_grad_(False)

        def run(tokens: int, dtype: torch.dtype):
            x = random(1, tokens, inputs, dtype=dtype)
            return Work(layer.to(dtype), x, x.nbytes + 2 * inputs * outputs + 2 * tokens * outputs, 2.0 * tokens * inputs * outputs)

        return run

    def attend(kernel: str):
        def make(tokens: int, dtype: torch.dtype):
            M = settings.window // CHUNK_FRAMES * tokens
            q = random(1, tokens, dims.heads, d, dtype=dtype)
            k, v = random(2, 1, M, dims.heads, d, dtype=dtype)
            return Work(lambda q: attention(q, k, v, kernel=kernel), q, 2 * q.nbytes + 2 * k.nbytes, 4.0 * tokens * M * D)

        return make

    return [
        Case(f"linear {D} -> {D}", linear(D, D), reference=False),
        Case(f"linear {D} -> {dims.ffn}", linear(D, dims.ffn), reference=False),
        Case(f"linear {dims.ffn} -> {D}", linear(dims.ffn, D), reference=False),
        Case("self-attention, full window", attend("auto"), reference=False),
        Case("self-attention in fp8", attend("fp8"), reference=False),
    ]


def _random(device: torch.device) -> Callable[..., torch.Tensor]:
    """random(*shape, dtype, like): normal values, `like` their spread."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape, dtype, like=1.0: like * torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _measure(case: Case, tokens: int, device: torch.device, rates: dict[str, float], repeats: int) -> dict:
    sets = [case.make(tokens, _dtype(device)) for _ in range(SETS)] * ROUNDS
    moved, operations = sets[0].moved, sets[0].operations
    floor = max(moved / rates["bytes_per_second"], operations / rates["operations_per_second"])
    fused = recorded(lambda: _each(sets, False), device, repeats) / len(sets)
    entry = {"microseconds": 1e6 * fused, "floor_microseconds": 1e6 * floor, "of_floor": floor / fused}
    if case.reference:
        plain = [work if work.reference is None else work._replace(call=work.reference) for work in sets]
        gradients = sets[0].reference is None
        for work in sets:
            work.x.requires_grad_(gradients)
        entry["reference_microseconds"] = 1e6 * recorded(lambda: _each(plain, gradients), device, max(3, repeats // 4)) / len(sets)
        entry["times_reference"] = entry["reference_microseconds"] / entry["microseconds"]
    if operations:
        entry["tflops"] = operations / fused / 1e12
    return entry


def _each(sets: list[Work], gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        for work in sets:
            work.call(work.x)


def _line(entry: dict) -> str:
    text = f"{entry['operation']:28s} {entry['microseconds']:9.1f} us, floor {entry['floor_microseconds']:8.1f} ({100 * entry['of_floor']:3.0f} %)"
    if "tflops" in entry:
        text += f", {entry['tflops']:.0f} TFLOP/s"
    return text + (f", reference {entry['reference_microseconds']:.1f} ({entry['times_reference']:.2f} times)" if "times_reference" in entry else "")
