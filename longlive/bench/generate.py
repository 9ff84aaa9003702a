"""Speed of generation: sampling alone, decoding alone, and both, end to end, in one process, or in several that make each film together.

For every precision, number of steps and VAE a row: what a steady chunk takes, when the first frames are there, how even the chunks come, how much memory.
The film is a `Session` with a `DecodeStage` as everywhere else. Networks are random in the sizes of a model, or a checkpoint's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch

from ..core.errors import InputError, LongLiveError
from ..core.geometry import CHUNK_FRAMES, Geometry
from ..core.log import launch_rank
from ..engine.decode import STAGES
from ..engine.pipeline import Pipeline
from ..engine.json_file import write_json
from ..models.spec import model_spec
from ..ops.attention import KERNELS
from ..parallel.mesh import Mesh, check_heads
from ..precision.converter import share_activation_scales
from .film import Arrivals, ChunkDecoder, film_kernels, film_session, first_seconds, run_film, warm_chunks, with_steps
from .networks import CheckpointNetworks, RandomNetworks, precision, seconds_of, vae_kind
from .record import surroundings
from .timing import Kernel, by_kind, kernels, timed

GIB = 2**30
RESULTS = Path("benchmarks/results")
LONGEST = 12  # kernels that a profile names
COMPARED = {"precision": str, "steps": int, "vae": str, "group": int, "graphs": str, "attention": str}
NO_VAE = "none"
# every row has these, None where a case did not measure them
MEASURED = (
    "denoise_fps", "decode_ms_per_chunk", "decode_fps", "end_to_end_fps", "ttff_s", "interchunk_ms", "deadline_attainment", "real_time_factor", "peak_gib",
    "warmup_s",
)  # fmt: skip
GRAPHS = {"auto": "auto", "on": True, "off": False}


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """What to measure. `chunks` are the steady ones; `window` in latent frames; `height`, `width` None: the model's own; `layers` None: all.

    `config`: a configuration file with checkpoints, changed by `overrides`; None: random weights of `model`. `decode`: an entry of `engine.decode.STAGES`.
    `attention`: an entry of `ops.attention.KERNELS`. `graphs`: record forwards: auto, on or off. `group`: latent frames per call of the decoder, 0 = the
    codec's own choice; `tile_rows`: latent rows of its tiles, 0 = whole frames. `vaes` may be ("none",): sampling alone. No measurement begins after `seconds`.
    """

    model: str = "wan2.2-ti2v-5b"
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("bf16",)
    steps: tuple[int, ...] = (4, 2)
    vaes: tuple[str, ...] = ("wan",)
    chunks: int = 16
    height: int | None = None
    width: int | None = None
    window: int = 32
    decode: str = "side-stream"
    group: int = 0
    tile_rows: int = 0
    layers: int | None = None
    graphs: str = "auto"
    attention: str = "auto"
    profile: bool = False
    seconds: float = 540.0

    def check(self) -> None:
        """Raises InputError for what cannot run."""
        for name in self.precisions:
            precision(name)
        for name in self.vaes:
            if name != NO_VAE:
                vae_kind(name, NO_VAE)
        if self.attention not in ("auto", *KERNELS):
            raise InputError(f"--attention {self.attention!r} is none of auto, {', '.join(KERNELS)}")
        if self.graphs not in GRAPHS:
            raise InputError(f"--graphs {self.graphs!r} is none of {', '.join(GRAPHS)}")
        if self.decode not in STAGES or self.decode == "other-device":
            raise InputError(f"--decode {self.decode!r} is none of inline, same-stream, side-stream")
        if (self.height is None) != (self.width is None):
            raise InputError("--height and --width belong together; give both or neither")
        if self.config is None and (self.window < CHUNK_FRAMES or self.window % CHUNK_FRAMES):
            raise InputError(f"--window {self.window} is no multiple of {CHUNK_FRAMES} latent frames")
        if self.layers is not None and self.layers < 1:
            raise InputError(f"--layers {self.layers}: a generator has at least one block")
        if not (self.precisions and self.steps and self.vaes) or min(*self.steps, self.chunks) < 1 or min(self.group, self.tile_rows) < 0:
            raise InputError("--precision, --steps, --vae name at least one each; --steps, --chunks are at least 1, --group, --vae-tile-rows at least 0")


def bench_generate(
    settings: GenerateSettings,
    path: Path | None,
    report: Callable[[str], None],
    *,
    device: torch.device | None = None,
    compare: tuple[str, str] | None = None,
    mesh: Mesh = Mesh(),
) -> list[dict]:
    """Measures every case, reports lines, writes the rows to `path` after each; returns them. A case that fails is a row that says so.

    `mesh`: the ranks that make each film together; all must call this, the first reports and writes, and a case that fails ends all.
    """
    settings.check()
    if mesh.sp_size > 1:
        check_heads(model_spec(settings.model).dit.heads, mesh.sp_size)
        if compare or settings.graphs == "on":
            raise InputError(f"--compare and --graphs on are for one process, not for {mesh.sp_size} that share a film; leave them away")
    if mesh.sp_rank:
        path, report = None, _unheard
    device = device or torch.device(f"cuda:{launch_rank()[2]}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bench = _Bench(settings, device, path, report, mesh)
    return bench.compare(*(_choice(settings, words) for words in compare)) if compare else bench.run()


def _unheard(line: str) -> None:
    """Of ranks that do not report."""


def results_file(name: str) -> Path:
    """Where a record goes that was given no place."""
    return RESULTS / f"{name}-{datetime.now(timezone.utc).strftime('%Y%m%d-%H%M%S')}.json"


def _choice(settings: GenerateSettings, words: str) -> dict:
    """Words such as steps=2,vae=wan -> one value of everything that `COMPARED` names; the rest is the first of the settings."""
    chosen = {"precision": settings.precisions[0], "steps": settings.steps[0], "vae": settings.vaes[0]}
    chosen |= {"group": settings.group, "graphs": settings.graphs, "attention": settings.attention}
    for word in filter(None, words.split(",")):
        name, _, value = word.partition("=")
        if name not in COMPARED or not value or (COMPARED[name] is int and not value.isdecimal()):
            raise InputError(f"--compare {words!r}: {word!r} is no setting; write NAME=VALUE with a name of {', '.join(COMPARED)}")
        chosen[name] = COMPARED[name](value)
    one = {"precisions": (chosen["precision"],), "steps": (chosen["steps"],), "vaes": (chosen["vae"],)}
    replace(settings, **one, graphs=chosen["graphs"], attention=chosen["attention"]).check()
    return chosen


class _Bench:
    def __init__(self, settings: GenerateSettings, device: torch.device, path: Path | None, report: Callable[[str], None], mesh: Mesh):
        self.settings, self.device, self.path, self.report, self.mesh = settings, device, path, report, mesh
        self.rows: list[dict] = []
        self.began = time.perf_counter()
        s = settings
        if s.config is not None:
            self.networks = CheckpointNetworks(s.config, s.overrides, device, mesh)
        else:
            size = None if s.height is None else Geometry(s.height, s.width)
            self.networks = RandomNetworks(s.model, size, device, window=s.window, layers=s.layers)
        self.head = surroundings(device, mesh.sp_size)
        for name, value in {**self.head, **asdict(settings)}.items():
            self.report(f"{name:12s} {value}")

    # ------------------------------------------------------------ every case

    def run(self) -> list[dict]:
        for name in self.settings.precisions:
            self._generator(name)
            _release(self.device)
        return self.rows

    def _generator(self, name: str) -> None:
        """The rows of one precision."""
        pipeline, load = seconds_of(lambda: self._pipeline(name), self.device)
        self.report(f"{name}: networks ready after {load:.1f} s")
        alone: dict[int, dict] = {}
        for steps in self.settings.steps:
            alone[steps] = self._tried(lambda steps=steps: self._denoise(with_steps(pipeline, steps)))
            self.report(f"{name}, {steps} steps: {_denoise_words(alone[steps])}")
        for vae in self.settings.vaes:
            self._decoded(pipeline, name, vae, alone, load)

    def _pipeline(self, name: str) -> Pipeline:
        pipeline = self.networks.pipeline(name)
        kind = self.settings.decode if self.device.type == "cuda" else "inline"
        settings = replace(pipeline.settings, attention=self.settings.attention)
        if self.mesh.sp_size > 1:
            share_activation_scales(pipeline.dit, self.mesh.largest)
        return replace(pipeline, mesh=self.mesh, decode_kind=kind, cuda_graphs=GRAPHS[self.settings.graphs], settings=settings)

    def _decoded(self, pipeline: Pipeline, name: str, vae: str, alone: dict[int, dict], load: float) -> None:
        """The rows of one VAE."""
        decode: dict = {}
        if vae != NO_VAE:
            codec, seconds = seconds_of(lambda: self.networks.codec(vae, name, self.settings.group, self.settings.tile_rows), self.device)
            pipeline, load = replace(pipeline, codec=codec), load + seconds
            decode = self._tried(lambda: self._decode(pipeline))
            self.report(f"{vae}: {_decode_words(decode)}")
        for steps in self.settings.steps:
            both = self._tried(lambda steps=steps: self._end_to_end(with_steps(pipeline, steps))) if vae != NO_VAE else {}
            self._row(pipeline, {"precision": name, "steps": steps, "vae": vae, "load_s": load}, alone[steps] | decode | both)
            _release(self.device)

    def _row(self, pipeline: Pipeline, key: dict, values: dict) -> None:
        s, g = self.settings, pipeline.geometry
        frames = pipeline.settings.window_frames
        ranks = self.mesh.sp_size
        shape = {"gpus": ranks if self.device.type == "cuda" else 0, "processes": ranks, "width": g.width, "height": g.height}
        shape |= {"window": frames, "chunks": s.chunks}
        model = {"model": pipeline.spec.name, "weights": "random" if s.config is None else str(s.config), "decode": pipeline.decode_kind}
        model |= {"group": s.group, "tile_rows": s.tile_rows, "graphs": s.graphs, "attention": pipeline.settings.attention}
        vae, plus, _ = key["vae"].partition("+")  # "wan+fp8" names a codec of the command line
        named = {**key, "vae": vae, "vae_fp8": bool(plus)}
        self.rows.append({**model, **named, **shape, **dict.fromkeys(MEASURED), **values, **self.head})
        self._write()
        self.report(f"{key['precision']}, {key['steps']} steps, {key['vae']}: {_row_words(self.rows[-1])}")

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.rows)

    def _denoise(self, pipeline: Pipeline) -> dict:
        _, warmup = seconds_of(lambda: run_film(pipeline, 1, decode=False), self.device)
        film = run_film(pipeline, self.settings.chunks, decode=False)
        steady = film.denoise[film.warm :]
        values = {
            "denoise_fps": film.fps,
            "denoise_ms_per_chunk": 1000 * median(steady),
            "denoise_interchunk_ms": film.percentiles_ms(),
            "denoise_ms_by_chunk": [round(1000 * seconds, 2) for seconds in film.denoise],
            "warmup_s": warmup,
        }
        if self.settings.profile:
            values["denoise_profile"] = _profile(film_kernels(pipeline))
        return values

    def _decode(self, pipeline: Pipeline) -> dict:
        decoder, warmup = seconds_of(lambda: ChunkDecoder(pipeline), self.device)
        seconds = decoder.seconds(max(3, self.settings.chunks // 2))
        frames = 4 * pipeline.settings.chunk_frames
        values = {"decode_ms_per_chunk": 1000 * median(seconds), "decode_fps": frames / median(seconds), "decode_warmup_s": warmup}
        if self.settings.profile:
            values["decode_profile"] = _profile(kernels(decoder.take, self.device))
        return values

    def _end_to_end(self, pipeline: Pipeline) -> dict:
        first_seconds(pipeline)
        _release(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        first = [first_seconds(pipeline) for _ in range(3)]
        film: Arrivals = run_film(pipeline, self.settings.chunks, decode=True)
        peak = torch.cuda.max_memory_allocated(self.device) / GIB if self.device.type == "cuda" else None
        return {
            "end_to_end_fps": film.fps,
            "end_to_end_mean_fps": film.mean_fps,
            "ttff_s": median(frames for frames, _ in first),
            "first_chunk_s": median(chunk for _, chunk in first),
            "interchunk_ms": film.percentiles_ms(),
            "deadline_attainment": film.attainment(),
            "real_time_factor": film.real_time,
            "peak_gib": peak,
        }

    def _tried(self, work: Callable[[], dict]) -> dict:
        """What `work` gives, or its failure: a case that cannot run must not end the others."""
        elapsed = time.perf_counter() - self.began
        if self.mesh.any(elapsed > self.settings.seconds):
            return {"failed": f"not begun, {elapsed:.0f} s are over (--seconds {self.settings.seconds:g})"}
        try:
            return work()
        except LongLiveError:
            raise
        except Exception as error:
            if self.mesh.sp_size > 1:
                raise  # the other ranks wait in an exchange
            failure = (str(error).strip() or type(error).__name__).splitlines()[0]
        _release(self.device)
        return {"failed": f"{failure[:300]}"}

    # ------------------------------------------------------------ two settings

    def compare(self, one: dict, two: dict) -> list[dict]:
        """Films of both settings, a chunk of one and a chunk of the other in turn, so that the card's clocks and heat are the same for both.

        Frames are decoded inline: on a stream of its own one film's decoding would fall into the other's time.
        """
        pipelines = self._two_pipelines(one, two)
        chunks = self.settings.chunks
        sessions = [film_session(p, warm_chunks(p) + chunks, decode=c["vae"] != NO_VAE) for p, c in zip(pipelines, (one, two))]
        for session, pipeline in zip(sessions, pipelines):
            for _ in range(warm_chunks(pipeline)):
                next(session)
        taken: list[list[float]] = [[], []]
        for turn in range(chunks):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                taken[which].append(timed(lambda which=which: next(sessions[which]), self.device)[0])
        for session in sessions:
            session.close()
        for choice, pipeline, seconds in zip((one, two), pipelines, taken):
            frames = 4 * pipeline.settings.chunk_frames
            values = {"interleaved_ms_per_chunk": 1000 * median(seconds), "interleaved_fps": frames / median(seconds)}
            self._row(pipeline, choice, values)
        ratio = median(taken[0]) / median(taken[1])
        self.rows[-1]["times_first"] = ratio
        self._write()
        self.report(f"{_words(two)} is {ratio:.3f} times as fast as {_words(one)}")
        return self.rows

    def _two_pipelines(self, one: dict, two: dict) -> list[Pipeline]:
        """Networks that both settings have in common exist once."""
        made: dict[tuple, object] = {}

        def shared(key: tuple, make: Callable[[], object]):
            if key not in made:
                made[key] = make()
            return made[key]

        pipelines = []
        for choice in (one, two):
            base = shared(("dit", choice["precision"]), lambda c=choice: self.networks.pipeline(c["precision"]))
            settings = replace(base.settings, steps=choice["steps"], attention=choice["attention"])
            pipeline = replace(base, settings=settings, decode_kind="inline", cuda_graphs=GRAPHS[choice["graphs"]])
            if choice["vae"] != NO_VAE:
                key = ("vae", choice["vae"], choice["group"])
                codec = shared(key, lambda c=choice: self.networks.codec(c["vae"], c["precision"], c["group"], self.settings.tile_rows))
                pipeline = replace(pipeline, codec=codec)
            pipelines.append(pipeline)
        return pipelines


def _profile(found: list[Kernel]) -> dict:
    """Milliseconds by kind, and the longest kernels."""
    longest = [{"kernel": k.name[:160], "kind": k.kind, "ms": round(1000 * k.seconds, 3), "launches": k.launches} for k in found[:LONGEST]]
    return {"ms_by_kind": {kind: round(1000 * seconds, 2) for kind, seconds in by_kind(found).items()}, "longest": longest}


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _words(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _profile_words(profile: dict) -> str:
    kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in profile["ms_by_kind"].items())
    longest = "".join(f"\n  {k['ms']:9.2f} ms {k['launches']:5d} x {k['kernel'][:110]}" for k in profile["longest"])
    return f"\n  ms by kind: {kinds}{longest}"


def _denoise_words(values: dict) -> str:
    if "failed" in values:
        return f"failed ({values['failed']})"
    text = f"denoise {values['denoise_fps']:.2f} FPS, {values['denoise_ms_per_chunk']:.1f} ms a chunk, warm-up {values['warmup_s']:.1f} s"
    return text + (_profile_words(values["denoise_profile"]) if "denoise_profile" in values else "")


def _decode_words(values: dict) -> str:
    if "failed" in values:
        return f"decode failed ({values['failed']})"
    text = f"decode {values['decode_ms_per_chunk']:.1f} ms a chunk = {values['decode_fps']:.2f} FPS, warm-up {values['decode_warmup_s']:.1f} s"
    return text + (_profile_words(values["decode_profile"]) if "decode_profile" in values else "")


def _row_words(row: dict) -> str:
    if "interleaved_fps" in row:
        return f"{row['interleaved_ms_per_chunk']:.1f} ms a chunk = {row['interleaved_fps']:.2f} FPS"
    if row["end_to_end_fps"] is None:
        return f"failed ({row['failed']})" if "failed" in row else "sampling alone"
    ms = row["interchunk_ms"]
    memory = "" if row["peak_gib"] is None else f", peak {row['peak_gib']:.1f} GiB"
    return (
        f"end to end {row['end_to_end_fps']:.2f} FPS (mean {row['end_to_end_mean_fps']:.2f}), first frames after {row['ttff_s']:.2f} s, first chunk "
        f"{row['first_chunk_s']:.2f} s, p50 {ms['p50']:.0f} p99 {ms['p99']:.0f} ms, in time at 24 fps {100 * row['deadline_attainment']:.0f} %{memory}"
    )
