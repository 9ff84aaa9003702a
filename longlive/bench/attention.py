"""Self-attention of teacher forcing alone, forward and with its gradients: our dense calls against FlexAttention with the same visibility, in one run.

All ways get the same rotated q, k, v of [clean; noisy] and the same gradient of the output, and take turns, so that the card's clocks are the same for all.
FlexAttention is compiled and gets its block mask from the rule, block by block: chunks are whole blocks, so that no block is partly visible,
which is the best case for it. Rates count visible pairs only.

Legend: B batch, N tokens, H heads, d head features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from ..cache.attend import PLAIN, TeacherForced
from ..core.errors import InputError
from ..core.tokens import Tokens
from ..ops.masks import dense_mask
from ..ops.merged_attention import film_attention, part_kernel
from .flops import attention_flops, visible_pairs
from .record import Record, surroundings
from .timing import timed

MERGED, FLEX = "merged", "flex"
WAYS = (MERGED, PLAIN, FLEX)
BLOCK = 128  # of FlexAttention's mask
STREAMS = 2
SMALL = 256  # tokens of a chunk where errors are measured

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """Sizes of the 5B model by default. `ways`: which to compare. `autotune`: let the compiler try FlexAttention's variants (minutes)."""

    chunks: tuple[int, ...] = (12, 24)
    chunk_tokens: int = 7040
    heads: int = 24
    head_dim: int = 128
    repeats: int = 5
    ways: tuple[str, ...] = WAYS
    autotune: bool = False

    def check(self) -> None:
        for way in self.ways:
            if way not in WAYS:
                raise InputError(f"--ways {way!r} is none of {', '.join(WAYS)}")
        if not self.chunks or min(*self.chunks, self.chunk_tokens, self.heads, self.head_dim, self.repeats) < 1:
            raise InputError("--chunks, --tokens, --heads, --head-dim and --repeats are all at least 1")
        if FLEX in self.ways and self.chunk_tokens % BLOCK:
            rest = f"--tokens {self.chunk_tokens} % {BLOCK} = {self.chunk_tokens % BLOCK}, not 0"
            raise InputError(f"{rest}: FlexAttention's mask is made of whole blocks; use a multiple or leave {FLEX} out")


def film(chunks: int, chunk_tokens: int) -> Tokens:
    """Metadata of [clean; noisy] with one frame per chunk."""
    none = torch.zeros(1, STREAMS * chunks)
    return Tokens(none, torch.arange(chunks).repeat(STREAMS), torch.arange(STREAMS * chunks) >= chunks, none.long(), 1, chunk_tokens)


def block_mask(chunks: int, chunk_tokens: int, device: torch.device):
    """FlexAttention's mask of the rule for [clean; noisy], whole blocks of BLOCK tokens only."""
    from torch.nn.attention.flex_attention import BlockMask

    def visible(b, h, query, key):
        q_chunk, k_chunk = query // chunk_tokens % chunks, key // chunk_tokens % chunks
        q_clean, k_clean = query < chunks * chunk_tokens, key < chunks * chunk_tokens
        return (k_clean & (k_chunk < q_chunk)) | ((k_chunk == q_chunk) & (q_clean == k_clean))

    blocks = dense_mask(film(chunks, chunk_tokens // BLOCK)).to(device)
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    count = blocks.sum(-1, dtype=torch.int32)
    nothing = torch.zeros_like(count), torch.zeros_like(order)
    return BlockMask.from_kv_blocks(*nothing, count, order, BLOCK_SIZE=BLOCK, mask_mod=visible)


def way(name: str, chunks: int, chunk_tokens: int, like: torch.Tensor, *, compiled: bool = True, autotune: bool = False) -> Way:
    """Attention of rotated q, k, v [B, N, H, d] in the way `name`; `like` shows their dtype, head and device."""
    if name != FLEX:
        strategy = TeacherForced(film(chunks, chunk_tokens), 2, kernel=PLAIN if name == PLAIN else part_kernel(like) or "math")
        strategy.rope = None  # q and k come rotated
        return lambda q, k, v: strategy(q, k, v, 0)
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(chunks, chunk_tokens, like.device)
    call = flex_attention
    if compiled:
        call = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs" if autotune else None)
    return lambda q, k, v: call(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask).transpose(1, 2)


def with_gradients(attend: Way, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """[output, dq, dk, dv]"""
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def random_inputs(chunks: int, chunk_tokens: int, heads: int, head_dim: int, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(q, k, v that want gradients, gradient of the output), bfloat16 on a GPU and float32 elsewhere."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, STREAMS * chunks * chunk_tokens, heads, head_dim)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    *inputs, grad = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
    return [t.requires_grad_() for t in inputs], grad


def errors(settings: AttentionSettings, name: str, device: torch.device, *, compiled: bool = True) -> dict[str, float]:
    """Relative errors of output and gradients against float32, on 3 chunks of SMALL tokens."""
    inputs, grad = random_inputs(3, SMALL, min(settings.heads, 4), settings.head_dim, device)
    exact = [t.detach().float().requires_grad_() for t in inputs]
    truth = with_gradients(lambda *t: film_attention(*t, streams=STREAMS, chunks=3, kernel="math")[0], exact, grad.float())
    found = with_gradients(way(name, 3, SMALL, inputs[0], compiled=compiled), inputs, grad)
    apart = ((mine.float() - right).norm() / right.norm() for mine, right in zip(found, truth))
    return dict(zip(("out", "dq", "dk", "dv"), (value.item() for value in apart)))


def bench_attention(settings: AttentionSettings, path: Path | None, report: Callable[[str], None]) -> list[dict]:
    """Measures every case, reports a line per way, writes `path` after every case; returns the entries. A way that fails is an entry too."""
    settings.check()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(0)
        torch.set_float32_matmul_precision("highest")  # the reference is float32
    head = {
        "benchmark": "ops attention",
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in vars(settings).items()},
        "timed": "attention on rotated q, k, v: forward without gradients; forward with backward to dq, dk, dv; medians, ways in turn",
    }
    where = surroundings(device, 1)
    record = Record(path, {**head, **where})
    for name, value in {**where, **head["settings"], "timed": head["timed"]}.items():
        report(f"{name:18s} {value}")
    compiled = device.type == "cuda"
    record.start({"errors_against_float32": True})
    found = {}
    for name in settings.ways:
        found[name] = _tried(lambda: errors(settings, name, device, compiled=compiled))
        report(f"errors, {name:7s} {found[name]}")
    record.finish({"errors": found})
    for chunks in settings.chunks:
        record.start({"chunks": chunks})
        record.finish(_case(settings, chunks, device, compiled, report))
    return record.rows


def _tried(work: Callable[[], dict]) -> dict:
    """What `work` gives, or its failure: one way that cannot run must not end the comparison."""
    try:
        return work()
    except Exception as error:
        failure = (str(error).strip() or type(error).__name__).splitlines()[0]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"failed": failure[:300]}


def _case(settings: AttentionSettings, chunks: int, device: torch.device, compiled: bool, report: Callable[[str], None]) -> dict:
    s = settings
    inputs, grad = random_inputs(chunks, s.chunk_tokens, s.heads, s.head_dim, device)
    ways = {name: way(name, chunks, s.chunk_tokens, inputs[0], compiled=compiled, autotune=s.autotune) for name in s.ways}
    works: dict[tuple[str, bool], Callable[[], object]] = {}
    failures: dict[str, dict] = {}
    for name, attend in ways.items():
        report(f"{chunks} chunks, {name}: warming up")
        works[name, False] = _without_gradients(attend, inputs)
        works[name, True] = _forward_backward(attend, inputs, grad)
        failure = _tried(lambda: {} if all(timed(works[name, both], device) for both in (False, True)) else {})
        if failure:
            failures[name] = failure
            report(f"{chunks} chunks, {name}: {failure['failed']}")
    times: dict[tuple[str, bool], list[float]] = {}
    for _ in range(s.repeats):
        for (name, both), work in works.items():
            if name not in failures:
                times.setdefault((name, both), []).append(timed(work, device)[1])
    pairs = visible_pairs(chunks, s.chunk_tokens)
    results = {name: failures.get(name) or _rates(s, pairs, times[name, False], times[name, True]) for name in ways}
    for name, values in results.items():
        if name not in failures:
            base = results.get(FLEX, {}).get("forward_backward_seconds")
            values |= {"times_flex": base / values["forward_backward_seconds"]} if base else {}
            report(f"{chunks} chunks, {name:7s} {_words(values)}")
    return {"visible_pairs": pairs, "kernel": part_kernel(inputs[0]) or "math", "ways": results}


def _without_gradients(attend: Way, inputs: list[torch.Tensor]) -> Callable[[], object]:
    def work() -> None:
        with torch.no_grad():
            attend(*inputs)

    return work


def _forward_backward(attend: Way, inputs: list[torch.Tensor], grad: torch.Tensor) -> Callable[[], object]:
    return lambda: with_gradients(attend, inputs, grad)


def _rates(settings: AttentionSettings, pairs: int, forward: list[float], both: list[float]) -> dict:
    flops = [attention_flops(pairs, settings.heads, settings.head_dim, backward=backward) for backward in (False, True)]
    return {
        "forward_seconds": median(forward),
        "forward_tflops": flops[0] / median(forward) / 1e12,
        "forward_backward_seconds": median(both),
        "forward_backward_tflops": flops[1] / median(both) / 1e12,
        "forward_backward_spread": max(both) / min(both) - 1,
    }


def _words(values: dict) -> str:
    text = (
        f"forward {1000 * values['forward_seconds']:.1f} ms = {values['forward_tflops']:.0f} TFLOP/s, "
        f"with backward {1000 * values['forward_backward_seconds']:.1f} ms = {values['forward_backward_tflops']:.0f} TFLOP/s"
    )
    return text + (f", {values['times_flex']:.2f} times FlexAttention" if "times_flex" in values else "")
