"""Speed and memory of a training step of the generator: random weights and latents, the network, optimizer and parallelism of a real run.

A case is a number of latent frames and a layout: "none" gives every process a sample of its own, "contiguous" and "balanced" share one sample between
all processes (`parallel.shard`). Timed is all of a step but its data: noise and targets on the device, forward, loss, backward, clipping, AdamW, moving
average. VAE and text encoder are not there. A case that does not fit in memory is an entry of the record like any other.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from ..core.errors import InputError, LongLiveError
from ..core.geometry import CHUNK_FRAMES
from ..models.spec import ModelSpec, model_spec
from ..parallel.data_parallel import Replicas
from ..parallel.failure import together
from ..parallel.mesh import Mesh
from ..parallel.shard import BALANCED, CONTIGUOUS
from ..train.launch import training_device
from .flops import training_flops, utilisation
from .record import Record, surroundings
from .step import PRECISIONS, RECOMPUTE, SHARDING, StepSettings, TrainingStep
from .timing import by_kind, kernels, timed

NONE = "none"
LAYOUTS = (NONE, CONTIGUOUS, BALANCED)
PEAK = 989e12  # bfloat16 operations a second of one H100 or H200, dense, by its datasheet
CARD_SHARE = 0.96  # of the memory; equal on all ranks, so that they run out at the same place; the rest is for the libraries
VOTE = timedelta(seconds=120)
GIB = 2**30
LONGEST = 30  # kernels that a profile names
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to measure. `layers`, `keep_reads`, `window` None: all blocks, all of them, the whole history.

    A case that runs out of memory is tried again without `keep_blocks`, with half of `keep_reads`, with none, then with `fallback_layers` blocks (None: not).
    `case_seconds` ends the timed steps of a case early (one is always taken); no case starts after `seconds`.
    """

    model: str = "wan2.2-ti2v-5b"
    frames: tuple[int, ...] = (96, 192, 384)
    layouts: tuple[str, ...] = LAYOUTS
    layers: int | None = None
    fallback_layers: int | None = None
    steps: int = 3
    warmup: int = 1
    case_seconds: float = 60.0
    seconds: float = 540.0
    window: int | None = None
    fsdp: str = "full"
    recompute: str = "blocks"
    keep_reads: int | None = None
    keep_blocks: int = 0
    compile: bool = False
    precision: str = "bf16"
    profile: bool = True

    def check(self, world: int) -> None:
        """Raises InputError for what cannot run on `world` processes."""
        spec = model_spec(self.model)
        words = (("--fsdp", self.fsdp, SHARDING), ("--recompute", self.recompute, RECOMPUTE), ("--precision", self.precision, tuple(PRECISIONS)))
        for name, value, known in words:
            if value not in known:
                raise InputError(f"{name} {value!r} is none of {', '.join(known)}")
        for layout in self.layouts:
            if layout not in LAYOUTS:
                raise InputError(f"--layouts {layout!r} is none of {', '.join(LAYOUTS)}")
            if layout != NONE and world == 1:
                raise InputError(f"--layouts {layout} shares a sample between processes and there is one; launch with torchrun or use --layouts none")
            if layout != NONE and spec.dit.heads % world:
                raise InputError(f"--layouts {layout}: {spec.dit.heads} heads cannot be shared equally by {world} processes; launch a divisor of them")
        if not self.frames or min(self.frames) < 1 or any(f % CHUNK_FRAMES for f in self.frames):
            raise InputError(f"--frames {','.join(map(str, self.frames))}: latent frames come in chunks of {CHUNK_FRAMES}; use multiples of it")
        for name, value in (("--layers", self.layers), ("--fallback-layers", self.fallback_layers)):
            if value is not None and not 1 <= value <= spec.dit.layers:
                raise InputError(f"{name} {value}: the model has 1 to {spec.dit.layers}")
        for name, value in (("--keep-reads", self.keep_reads), ("--keep-blocks", self.keep_blocks)):
            if value is not None and value < 0:
                raise InputError(f"{name} {value} is negative; use 0 or more blocks")
        if self.steps < 1 or self.warmup < 0 or (self.window is not None and self.window < 2):
            raise InputError(f"--steps {self.steps}, --warmup {self.warmup}, --window {self.window}: at least 1, 0 and 2")



def bench_train(settings: TrainSettings, path: Path | None, report: Callable[[str], None], *, resume: bool = False) -> list[dict]:
    """Measures every case, reports a line for each as it ends, writes `path` after each; returns the entries. Every process of the launch must call it.

    Raises LongLiveError where some of the ranks ran out of memory and others wait for them; `resume` then goes on with the next case.
    """
    replicas = Replicas.launch("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with together(replicas):
            settings.check(replicas.size)
            return _Bench(settings, replicas, path, report if replicas.rank == 0 else _silent, resume).run()
    finally:
        replicas.leave()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is about the card's memory, whichever library met it."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))


def _silent(line: str) -> None:
    pass


class _Bench:
    def __init__(self, settings: TrainSettings, replicas: Replicas, path: Path | None, report: Callable[[str], None], resume: bool):
        self.settings, self.replicas, self.report = settings, replicas, report
        self.device = training_device("auto", replicas.local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(CARD_SHARE, self.device)
        self.spec: ModelSpec = model_spec(settings.model)
        shared = any(layout != NONE for layout in settings.layouts)
        self.meshes = {1: Mesh.launch(1, self.device.type)}
        if shared:
            self.meshes[replicas.size] = Mesh.launch(replicas.size, self.device.type)
        self.votes = dist.new_group(backend="gloo") if replicas.size > 1 else None
        head = {
            "benchmark": "train",
            "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in vars(settings).items()},
            "timed": "noise, targets, forward, loss, backward, clipping, AdamW, moving average; median over steps of the slowest rank",
            "peak_flops": PEAK,
        }
        where = surroundings(self.device, replicas.size)
        self.record = Record(path, {**head, **where}, resume=resume, writes=replicas.rank == 0)
        for name, value in {**where, **head["settings"], "timed": head["timed"]}.items():
            self.report(f"{name:18s} {value}")

    def run(self) -> list[dict]:
        began = time.perf_counter()
        for frames in sorted(self.settings.frames):
            for layout in self.settings.layouts:
                for layers, keep_reads, keep_blocks in self._tries():
                    key = {"frames": frames, "layout": layout, "layers": layers, "keep_reads": keep_reads, "keep_blocks": keep_blocks}
                    if self._case(key, began) != OUT_OF_MEMORY:
                        break
        self.report("all cases:")
        for entry in self.record.rows:
            self.report(f"{_name(entry)}: {_line(entry)}")
        return self.record.rows

    def _tries(self) -> list[tuple[int, int, int]]:
        """(layers, keep_reads, keep_blocks), less memory each time."""
        s = self.settings
        layers = s.layers or self.spec.dit.layers
        whole = min(layers, s.keep_blocks) if s.recompute == "blocks" else 0
        keep = min(layers, layers if s.keep_reads is None else s.keep_reads) if s.recompute == "blocks" and not s.window else 0
        tries = [(layers, min(keep, layers - whole), whole), *[(layers, k, 0) for k in (keep, keep // 2, 0)]]
        if s.fallback_layers is not None and s.fallback_layers < layers:
            tries.append((s.fallback_layers, min(keep, s.fallback_layers), 0))
        return list(dict.fromkeys(tries))

    def _case(self, key: dict, began: float) -> str:
        # rank 0 reads the record; the clock of the slowest counts
        done, elapsed = self.replicas.maximum(float(self.replicas.rank == 0 and self.record.done(key)), time.perf_counter() - began)
        if done:
            self.report(f"{_name(key)}: in the record already")
            return self._status(key)
        if elapsed > self.settings.seconds:
            self.report(f"{_name(key)}: not begun, {elapsed:.0f} s are over (--seconds {self.settings.seconds:g})")
            return "late"
        self.record.start(key)
        values = self._attempt(key)
        _release(self.device)
        self.record.finish(values)
        self.report(f"{_name(key)}: {_line(values)}")
        return values["status"]

    def _status(self, key: dict) -> str:
        """How the recorded case ended, on every rank: one that never finished is taken for one without memory."""
        ended = self.replicas.rank == 0 and any(entry["status"] == "done" for entry in self.record.rows if key.items() <= entry.items())
        return "done" if self.replicas.maximum(float(ended))[0] else OUT_OF_MEMORY

    def _attempt(self, key: dict) -> dict:
        """The entry of a case; running out of memory is one. All ranks agree on which it is."""
        values, failure = {}, ""
        try:
            values = self._measure(key)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            failure = (str(error).strip() or "out of memory").splitlines()[0]
        self._vote(key, failure)
        if self.replicas.maximum(float(bool(failure)))[0]:
            return {"status": OUT_OF_MEMORY, "message": failure or "on another rank"}
        return {"status": "done", **values}

    def _vote(self, key: dict, failure: str) -> None:
        if self.votes is None:
            return
        try:
            dist.monitored_barrier(group=self.votes, timeout=VOTE)
        except RuntimeError as error:
            reason = f"{_name(key)}: only some of the ranks ran out of memory, the others wait for them" if failure else f"{_name(key)}: a rank is stuck"
            raise LongLiveError(f"{reason}; run again with --resume to go on with the next case") from error

    def _measure(self, key: dict) -> dict:
        s, world = self.settings, self.replicas.size
        mesh = self.meshes[1 if key["layout"] == NONE else world]
        began = time.perf_counter()
        dims = replace(self.spec.dit, layers=key["layers"])
        options = StepSettings(
            frames=key["frames"], layout=BALANCED if key["layout"] == NONE else key["layout"],
            window=s.window, fsdp=s.fsdp, recompute=s.recompute, keep_reads=key["keep_reads"], keep_blocks=key["keep_blocks"],
            compile=s.compile,
            precision=s.precision,
        )  # fmt: skip
        step = TrainingStep(self.spec, dims, options, mesh, self.device)
        prepared = time.perf_counter() - began
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        warm = [self._timed(step)[0] for _ in range(s.warmup)]
        self.report(f"{_name(key)}: ready after {prepared:.1f} s, warm-up {', '.join(f'{t:.2f}' for t in warm) or 'none'} s")
        taken: list[tuple[float, float]] = []
        while len(taken) < s.steps and (not taken or sum(wall for wall, _ in taken) < s.case_seconds):
            taken.append(self._timed(step))
            self.report(f"{_name(key)}: step {len(taken)} of {s.steps}, {taken[-1][0]:.3f} s")
        values = self._figures(key, step, taken, mesh)
        values |= {"seconds_to_prepare": prepared, "warmup_seconds": warm}
        if s.profile and self.device.type == "cuda":
            values |= self._profiled(step)
        return values

    def _profiled(self, step: TrainingStep) -> dict:
        """One more step, looked at on the first rank. A profiler that fails must not cost the case its figures."""
        if self.replicas.rank:
            step.take()
            return {}
        try:
            found = kernels(step.take, self.device)
            longest = [{"name": k.name[:120], "kind": k.kind, "seconds": round(k.seconds, 4), "launches": k.launches} for k in found[:LONGEST]]
            return {"kernel_seconds": by_kind(found), "longest_kernels": longest}
        except RuntimeError as error:
            return {"profile_failed": (str(error).strip() or type(error).__name__).splitlines()[0]}

    def _timed(self, step: TrainingStep) -> tuple[float, float]:
        return tuple(self.replicas.maximum(*timed(step.take, self.device)))

    def _figures(self, key: dict, step: TrainingStep, taken: list[tuple[float, float]], mesh: Mesh) -> dict:
        seconds, samples = median(wall for wall, _ in taken), mesh.dp_size
        frame_tokens = step.geometry.frame_tokens
        flops = samples * training_flops(
            key["frames"], step.dims, chunk_frames=CHUNK_FRAMES, frame_tokens=frame_tokens, text_keys=step.text_keys, pages=self.settings.window
        )
        peaks = torch.zeros(self.replicas.size, dtype=torch.float64)
        if self.device.type == "cuda":
            peaks[self.replicas.rank] = torch.cuda.max_memory_allocated(self.device) / GIB
        if self.replicas.size > 1:
            dist.all_reduce(peaks)
        return {
            "samples_per_step": samples,
            "seconds_per_step": seconds,
            "seconds_of_steps": [wall for wall, _ in taken],
            "seconds_by_events": median(events for _, events in taken),
            "tokens_per_second": samples * step.streams * key["frames"] * frame_tokens / seconds,
            "latent_frames_per_second": samples * key["frames"] / seconds,
            "flops_per_step": flops,
            "tflops_per_second_and_card": flops / seconds / self.replicas.size / 1e12,
            "utilisation": utilisation(flops, seconds, self.replicas.size, PEAK),
            "peak_gib_by_rank": [round(peak, 2) for peak in peaks.tolist()],
            "attention": step.attention,
            "loss": step.loss,
        }


def _release(device: torch.device) -> None:
    """After a case: what it left is garbage now, also where it ended in an exception."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _name(key: dict) -> str:
    return f"{key['frames']:>4} frames, {key['layout']:<10} {key['layers']:>2} layers, {key['keep_reads']:>2} reads and {key['keep_blocks']:>2} blocks kept"


def _line(values: dict) -> str:
    if values["status"] != "done":
        return f"{values['status']} ({values.get('message', 'it ended the processes')[:140]})"
    kinds = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in values.get("kernel_seconds", {}).items())
    return (
        f"{values['seconds_per_step']:.3f} s/step, {values['tokens_per_second']:.0f} tokens/s, {values['tflops_per_second_and_card']:.1f} TFLOP/s a card = "
        f"{100 * values['utilisation']:.1f} % of {PEAK / 1e12:.0f}, peak {max(values['peak_gib_by_rank']):.1f} GiB"
        + (f"; kernel seconds: {kinds}" if kinds else "")
    )
