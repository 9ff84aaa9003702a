"""Number formats side by side: the generator's forward with every way to compute its linear layers and every store of keys and values, in one run.

A steady chunk: 8 latent frames denoised against a full window. All ways have the same weights, drawn in bfloat16, and the same pages; they take turns, so that
the card's clocks are the same for all. "Linear" is what linear layers do in a forward, their activations' quantisation and the GELU included, attention,
norms and residuals left out. Errors are relative: |y - right| / |right| of the velocity, against the same network in float32.

Legend: B batch, N tokens of a chunk, D features, F features of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..cache.attend import Cached
from ..cache.policy import Window
from ..core.errors import InputError
from ..core.geometry import CHUNK_FRAMES, Geometry
from ..core.tokens import Tokens
from ..engine.rollout import RolloutSettings
from ..models.joint import join_projections
from ..models.spec import DiTDims, ModelSpec, model_spec
from ..models.wan_dit import TextContext, WanDiT
from ..ops import fp4_matmul, nvfp4
from ..ops.kv_formats import FORMATS
from ..ops.linear import joint_linear, linear_gelu
from ..ops.quant_matmul import fp8_row_scales
from ..precision.backends import BACKENDS
from .networks import filled, precision
from .record import Record, surroundings
from .timing import recorded, timed

BF16, FLOAT32 = "bf16", "float32"
GIB = 2**30
SIGMA = 0.5
BEYOND_CACHES = {"cuda": 2**30, "cpu": 2**20}  # bytes; the largest caches of GPUs hold 2^27
PARTS = {
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"), "self_attn.o": ("self_attn.o",), "cross_attn": ("cross_attn.q", "cross_attn.o"),
    "text": ("cross_attn.k", "cross_attn.v"), "ffn.0": ("ffn.0",), "ffn.2": ("ffn.2",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings:
    """`ways`: entries of `networks.PRECISIONS`; `stores`: bf16 and formats of `kv_formats`; `window` in chunks; `exact`: errors against float32 as well.

    `parts`: also the error that each kind of layer brings when it alone is quantised, for the first way that is not bf16.
    """

    model: str = "wan2.2-ti2v-5b"
    ways: tuple[str, ...] = (BF16, "fp8", "w4a8", "w4a16", "emulated")
    stores: tuple[str, ...] = (BF16, *FORMATS)
    layers: int | None = None
    height: int | None = None
    width: int | None = None
    window: int = 4
    prompt_tokens: int = 128
    repeats: int = 5
    exact: bool = True
    parts: bool = False

    def check(self) -> None:
        for name in self.ways:
            precision(name)
        for store in self.stores:
            if store not in (BF16, *FORMATS):
                raise InputError(f"--stores {store!r} is none of {BF16}, {', '.join(FORMATS)}")
        if BF16 not in self.ways or BF16 not in self.stores:
            raise InputError(f"--ways and --stores are compared with {BF16}; leave it among both")
        if min(self.window, self.repeats, self.prompt_tokens) < 1 or (self.layers is not None and self.layers < 1):
            raise InputError("--window, --repeats, --prompt-tokens and --layers are at least 1")
        if (self.height is None) != (self.width is None):
            raise InputError("--height and --width belong together; give both or neither")


class Scene:
    """What every way computes on: latents, text rows, and the keys and values of the earlier chunks of a window."""

    def __init__(self, settings: PrecisionSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.spec: ModelSpec = model_spec(settings.model)
        self.dims: DiTDims = self.spec.dit if settings.layers is None else replace(self.spec.dit, layers=settings.layers)
        size = Geometry(settings.height or self.spec.height, settings.width or self.spec.width)
        self.height, self.width = size.token_height, size.token_width
        self.tokens = CHUNK_FRAMES * self.height * self.width

    def normal(self, *shape: int, seed: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device)

    def network(self, name: str, only: tuple[str, ...] = ()) -> WanDiT:
        """The network in the precision `name`; `only`: nothing but layers whose names end so are quantised."""
        dit = filled(lambda: WanDiT(self.dims), self.device, torch.bfloat16)
        chosen = precision(name)
        if chosen.convert is None:
            dit = dit.to(chosen.dtype)
        elif only:
            self._convert_some(dit, name, only)
        else:
            chosen.convert(dit, self.spec)
        join_projections(dit)
        return dit

    def _convert_some(self, dit: WanDiT, name: str, only: tuple[str, ...]) -> None:
        from ..precision.converter import LinearConverter, Selection

        others = tuple(n for n, m in dit.named_modules() if isinstance(m, torch.nn.Linear) and not (n.startswith("blocks.") and n.endswith(only)))
        LinearConverter(backend=BACKENDS[name], selection=Selection(filtered=others, default=False)).convert(dit, self.spec)

    def place(self, chunk: int) -> Tokens:
        frames = CHUNK_FRAMES
        position = (chunk * frames + torch.arange(frames, dtype=torch.float64))[None].to(self.device)
        prompt = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        return Tokens(position, torch.full((frames,), chunk), torch.ones(frames, dtype=torch.bool), prompt, self.height, self.width)

    def store(self, format: str, dtype: torch.dtype):
        """A store whose slots hold a full window of random pages with strong channel means; the last slot is the running chunk's."""
        s, d = self.settings, self.dims
        kept = RolloutSettings(window_frames=s.window * CHUNK_FRAMES, kv_format=None if format == BF16 else format)
        pages = kept.store(d.layers, 1, s.window, self.tokens, d.heads, d.head_dim, device=self.device, dtype=dtype)
        mean = 2 * self.normal(d.heads, d.head_dim, seed=7)
        for chunk in range(s.window - 1):
            attend = Cached(pages, [Window(tuple(range(chunk + 1)))], chunk, self.place(chunk), d.head_dim, commit=True)
            for layer in range(d.layers):
                k, v = (self.normal(1, self.tokens, d.heads, d.head_dim, seed=100 * chunk + 2 * layer + i).bfloat16() for i in (0, 1))
                with torch.no_grad():
                    attend(None, (k + mean).to(dtype), v.to(dtype), layer)
        return pages

    def forward(self, dit: WanDiT, pages) -> Callable[[], torch.Tensor]:
        """One denoising pass over the running chunk, which reads the whole window."""
        d, dtype = self.dims, dit.patch_embedding.weight.dtype
        tokens, own = self.place(self.settings.window - 1), self.settings.window - 1
        attend = Cached(pages, [Window(tuple(range(own + 1)))], own, tokens, d.head_dim)
        x = self.normal(1, self.tokens, 4 * d.channels, seed=1).to(dtype)
        sigma = torch.full((1, CHUNK_FRAMES), SIGMA, dtype=torch.float64, device=self.device)
        with torch.no_grad():
            text: TextContext = dit.text([self.normal(min(self.settings.prompt_tokens, d.text_len), d.text_dim, seed=2).to(dtype)])

        def work() -> torch.Tensor:
            with torch.no_grad():
                return dit(x, tokens, sigma, text, attend)

        return work

    def linear(self, dit: WanDiT) -> Callable[[], None]:
        """The linear layers of a forward on random inputs, block by block."""
        dtype = dit.patch_embedding.weight.dtype
        h = self.normal(1, self.tokens, self.dims.dim, seed=3).to(dtype)

        def work() -> None:
            with torch.no_grad():
                for block in dit.blocks:
                    joint_linear(h, block.self_attn.q, block.self_attn.k, block.self_attn.v)
                    for layer in (block.self_attn.o, block.cross_attn.q, block.cross_attn.o):
                        layer(h)
                    block.ffn[2](linear_gelu(h, block.ffn[0], block.ffn[2]))

        return work


def relative(y: torch.Tensor, right: torch.Tensor) -> float:
    return ((y.float() - right.float()).norm() / right.float().norm()).item()


def bench_precision(settings: PrecisionSettings, path: Path | None, report: Callable[[str], None], *, device: torch.device | None = None) -> list[dict]:
    """Measures everything, reports lines, writes `path` after every case; returns the entries. A way that cannot run is an entry that says why."""
    settings.check()
    device = device or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")  # the reference is float32
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(settings).items()}
    timed_what = "one forward of a steady chunk; medians, ways in turn"
    head = {"benchmark": "precision", "settings": values, "timed": timed_what}
    where = surroundings(device, 1)
    record = Record(path, {**head, **where})
    for name, value in {**where, **values}.items():
        report(f"{name:18s} {value}")
    scene = Scene(settings, device)
    bench = _Bench(scene, record, report)
    bench.conversions()
    bench.ways()
    bench.stores()
    if settings.parts:
        bench.parts()
    return record.rows


class _Bench:
    def __init__(self, scene: Scene, record: Record, report: Callable[[str], None]):
        self.scene, self.record, self.report, self.device = scene, record, report, scene.device
        self.settings = scene.settings
        self.right: torch.Tensor | None = None

    def _in_turn(self, works: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Median seconds of each, one after the other, as often as the settings say; the first round does not count."""
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(self.settings.repeats + 1):
            for name, work in works.items():
                seconds = timed(work, self.device)[1]
                if turn:
                    times[name].append(seconds)
        return {name: median(values) for name, values in times.items()}

    def _memory(self, work: Callable[[], object]) -> float:
        """GiB that `work` holds at its highest beyond what was there before; 0 on a CPU, which does not count."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / GIB

    def _case(self, key: dict, work: Callable[[], dict]) -> dict:
        """A case with its entry; a failure is an entry too, so that one way that cannot run does not end the comparison."""
        self.record.start(key)
        try:
            found = work()
        except Exception as error:
            found = {"failed": (str(error).strip() or type(error).__name__).splitlines()[0][:300]}
            self.report(f"{key}: {found['failed']}")
        self.record.finish(found)
        return found

    def conversions(self) -> None:
        """Packed weights made dense or FP8 against copies of as many bytes, all over so many matrices in turn that no cache holds them."""
        d = self.scene.dims
        first = nvfp4.quantise(self.scene.normal(d.ffn, d.dim, seed=5).bfloat16(), "mse")
        scales, size = fp8_row_scales(first), d.ffn * d.dim
        ways = {
            "to_bf16": (lambda w: fp4_matmul.dequantised(w, torch.bfloat16), first.bytes + 2 * size),
            "to_fp8": (lambda w: fp4_matmul.as_rows(w, scales), first.bytes + scales.nbytes + size),
        }

        def seconds(make: Callable[[Any], object], sources: list) -> float:
            """Of one call; results are kept until all are there, so that each has memory of its own."""
            return recorded(lambda: [make(source) for source in sources], self.device, self.settings.repeats) / len(sources)

        def work() -> dict:
            found = {}
            for name, (make, moved) in ways.items():
                count = BEYOND_CACHES[self.device.type] // moved + 1
                halves = [torch.full((moved // 2,), i, dtype=torch.uint8, device=self.device) for i in range(count)]
                copy = seconds(torch.clone, halves)
                halves.clear()
                taken = seconds(make, [replace(first, **{part: t.clone() for part, t in first.state().items()}) for _ in range(count)])
                found[name] = {"seconds": taken, "tb_per_second": moved / taken / 1e12, "copy_seconds": copy, "of_copy": copy / taken}
                self.report(f"weights {d.ffn} x {d.dim} {name:8s} {1e6 * taken:.1f} us, a copy {1e6 * copy:.1f}: {100 * copy / taken:.0f} % of its speed")
            return found

        self._case({"conversion": f"{d.ffn}x{d.dim}"}, work)

    def _exact(self) -> None:
        """The velocity in float32, kept for all that follows."""

        def work() -> dict:
            dit, pages = self.scene.network(FLOAT32), self.scene.store(BF16, torch.float32)
            self.right = self.scene.forward(dit, pages)()
            return {"norm": self.right.norm().item()}

        self._case({"way": FLOAT32}, work)
        self._release()

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def ways(self) -> None:
        """Every way to compute linear layers, over the bf16 store."""
        if self.settings.exact:
            self._exact()
        pages = self.scene.store(BF16, torch.bfloat16)
        forwards, linears, entries = {}, {}, {}
        for name in self.settings.ways:
            entries[name] = self._case({"network": name}, lambda name=name: self._network(name, pages, forwards, linears))
        for what, works in (("forward", forwards), ("linear", linears)):
            found = self._in_turn(works)
            for name, seconds in found.items():
                entries[name] |= {f"{what}_ms": 1000 * seconds, f"{what}_times_bf16": found[BF16] / seconds}
        for name, values in entries.items():
            if name in forwards:
                self._case({"way": name}, lambda values=values: values)
                self.report(f"{name:10s} {_words(values)}")

    def _network(self, name: str, pages, forwards: dict, linears: dict) -> dict:
        dit = self.scene.network(name)
        forward = self.scene.forward(dit, pages)
        y = forward()
        if name == BF16:
            self.base = y
        found = {"weights_gib": sum(t.nbytes for t in (*dit.parameters(), *dit.buffers())) / GIB, "activations_gib": self._memory(forward)}
        found |= {"error_bf16": relative(y, self.base)} if name != BF16 else {}
        found |= {"error_float32": relative(y, self.right)} if self.right is not None else {}
        forwards[name], linears[name] = forward, self.scene.linear(dit)
        return found

    def stores(self) -> None:
        """Every store of keys and values, with linear layers in bf16."""
        dit = self.scene.network(BF16)
        works, entries = {}, {}
        for format in self.settings.stores:
            entries[format] = self._case({"pages": format}, lambda format=format: self._store(format, dit, works))
        found = self._in_turn(works)
        for format, seconds in found.items():
            entries[format] |= {"forward_ms": 1000 * seconds, "more_than_bf16_ms": 1000 * (seconds - found[BF16])}
            self._case({"store": format}, lambda format=format: entries[format])
            self.report(f"KV {format:7s} {_words(entries[format])}")

    def _store(self, format: str, dit: WanDiT, works: dict) -> dict:
        pages = self.scene.store(format, torch.bfloat16)
        commit = self._commit(pages)
        forward = self.scene.forward(dit, pages)  # after the commit: what was begun last says whether pages are written
        y = forward()
        found = {"store_gib": pages.bytes / GIB, "error_bf16": relative(y, self.base), "commit_ms": 1000 * commit}
        found |= {"error_float32": relative(y, self.right)} if self.right is not None else {}
        works[format] = forward
        return found

    def _commit(self, pages) -> float:
        """Seconds to write one chunk's keys and values of all layers."""
        d, own = self.scene.dims, self.settings.window - 1
        attend = Cached(pages, [Window(tuple(range(own + 1)))], own, self.scene.place(own), d.head_dim, commit=True)
        k = self.scene.normal(1, self.scene.tokens, d.heads, d.head_dim, seed=4).bfloat16()

        def work() -> None:
            with torch.no_grad():
                for layer in range(d.layers):
                    attend(None, k, k, layer)

        timed(work, self.device)
        return timed(work, self.device)[1]

    def parts(self) -> None:
        """The error that each kind of layer brings when it alone is quantised."""
        way = next((name for name in self.settings.ways if name in BACKENDS), None)
        if way is None:
            return
        pages = self.scene.store(BF16, torch.bfloat16)
        for part, names in PARTS.items():

            def work(names=names) -> dict:
                y = self.scene.forward(self.scene.network(way, names), pages)()
                return {"error_bf16": relative(y, self.base)} | ({"error_float32": relative(y, self.right)} if self.right is not None else {})

            found = self._case({"part": part, "of": way}, work)
            self._release()
            self.report(f"{way}, only {part:14s} {_words(found)}")


def _words(values: dict) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))
