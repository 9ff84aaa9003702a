"""Films that 2 and 4 ranks make together: what the transformer says at every step, and what is kept of every chunk, is that of one rank."""

from functools import cache

import pytest
import torch
from ranks import run_ranks
from sp_toys import CUTS, DIMS, HEIGHT, WIDTH, toy_dit
from tiny_pipeline import random_pipeline

from longlive.bench.generate import GenerateSettings, bench_generate
from longlive.config import default_config
from longlive.core.errors import ConfigError, InputError
from longlive.core.story import Shot, Storyboard
from longlive.diffusion.known import KnownFrames
from longlive.engine.pipeline import Pipeline
from longlive.engine.rollout import Rollout, RolloutSettings
from longlive.engine.session import Request
from longlive.models.lora import attach, branches
from longlive.models.spec import TINY
from longlive.parallel.film_groups import film_mesh, group_of, group_sizes
from longlive.parallel.mesh import Mesh
from longlive.precision.backends import BACKENDS
from longlive.precision.converter import LinearConverter, share_activation_scales

F, CHUNKS, BATCH = 4, 4, 2
ROWS = [[0, 0, 1, 1], [2, 3, 3, 2]]
NEGATIVE = 4
CASES = {
    "window, sinks, cuts": {},
    "cuts that drop pages": {"recache": True},
    "relative positions": {"relative": True},
    "no sinks": {"sink_frames": 0},
    "guidance in one forward": {"guidance": 3.0},
    "guidance in two forwards": {"guidance": 3.0, "batched_guidance": False},
    "a given first frame": {"known": 1},
    "given frames on several ranks, and a whole chunk": {"known": 7, "guidance": 2.0},
    "a live LoRA": {"lora": True},
    "w4a4": {"linear": "emulated"},
    "fp8": {"linear": "fp8"},
    **{f"{format} pages": {"kv_format": format} for format in ("fp8", "int8", "nvfp4")},
    "nvfp4 pages, sinks in full, relative": {"kv_format": "nvfp4", "kv_keep_sinks": True, "relative": True},
    "everything": {"kv_format": "int8", "guidance": 2.0, "known": 3, "lora": True, "linear": "emulated", "recache": True},
}
LOW = {"w4a4", "fp8", "everything"}  # computed in float32: the layers' own type


def network(mesh, linear, lora, dtype):
    dit = toy_dit().to(dtype)
    if linear is not None:
        LinearConverter(backend=BACKENDS[linear]).convert(dit, TINY)
        share_activation_scales(dit, mesh.largest if mesh.sp_size > 1 else None)
    if lora:
        attach(dit, TINY, rank=2, generator=torch.Generator().manual_seed(3))
        for _, branch in branches(dit):
            torch.nn.init.normal_(branch.b, std=0.1, generator=torch.Generator().manual_seed(4))
        dit.to(dtype)
    return dit.requires_grad_(False)


def film(mesh, *, known=0, lora=False, linear=None, **changes):
    """(velocities of this rank's frames at every step, latents of every chunk)."""
    dtype = torch.float64 if linear is None else torch.float32
    dit, generator = network(mesh, linear, lora, dtype), torch.Generator().manual_seed(1)
    settings = RolloutSettings(**{"chunk_frames": F, "window_frames": 3 * F, "sink_frames": F, "shot_offset": 3.0, "steps": 2} | changes)
    size = {"token_height": HEIGHT // 2, "token_width": WIDTH // 2, "batch": BATCH}
    rollout = Rollout(dit, settings, **size, device=torch.device("cpu"), dtype=dtype, mesh=mesh)
    text = dit.text([torch.randn(i % 4 + 1, DIMS.text_dim, generator=generator) for i in range(NEGATIVE + 1)])
    given = KnownFrames(torch.randn(BATCH, known, DIMS.channels, HEIGHT, WIDTH, generator=generator)) if known else None
    noise = torch.randn(CHUNKS, BATCH, F, DIMS.channels, HEIGHT, WIDTH, generator=generator)
    said, latents = [], []
    dit.head.register_forward_hook(lambda module, inputs, out: said.append(out))
    for chunk in range(CHUNKS):
        rows, cuts = [r[chunk] for r in ROWS], [c[chunk] for c in CUTS[1 : 1 + BATCH]]
        latents.append(rollout.step(noise[chunk], text, rows, cuts, negative=NEGATIVE if settings.guidance != 1 else None, known=given))
    return torch.stack(said), torch.stack(latents)


def stopped(mesh):
    """How many chunks the session makes when one rank of the first group is told to stop after the first of them."""
    pipeline = random_pipeline()
    pipeline.mesh = mesh
    board = Storyboard(shots=(Shot(prompt="a", chunks=2), Shot(prompt="b", chunks=1)))
    with pipeline.session(Request(storyboards=(board,), decode=mesh.sp_rank == 0)) as session:
        found = [next(session)]
        if mesh.dp_rank == 0 and mesh.sp_rank == 1:
            session.cancel()
        found += session
    return len(found), found[0].latents_BFCHW, found[0].frames is not None


def measured(mesh):
    """(lines, rows) that the bench of generation gives this rank."""
    small = GenerateSettings(model="tiny", layers=1, height=64, width=64, steps=(1,), vaes=("none",), chunks=1)
    lines = []
    return bench_generate(small, None, lines.append, device=torch.device("cpu"), mesh=mesh), lines


def everything(sp_size):
    mesh = Mesh.launch(sp_size, "cpu")
    return {name: film(mesh, **case) for name, case in CASES.items()} | ({"stopped": stopped(mesh), "measured": measured(mesh)} if sp_size == 2 else {})


@cache
def alone(case):
    return film(Mesh(), **CASES[case])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return {size: run_ranks(everything, size, tmp_path_factory.mktemp(f"ranks{size}"), size) for size in (2, 4)}


@pytest.mark.parametrize("sp_size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_that_share_a_film_make_that_of_one(found, case, sp_size):
    said, latents = alone(case)
    parts = [rank[case] for rank in found[sp_size]]
    together = torch.cat([own for own, _ in parts], dim=2)
    assert together.shape == said.shape and all(torch.equal(parts[0][1], whole) for _, whole in parts)
    if case in LOW:
        assert (together - said).norm() < 0.02 * said.norm() and (together[0] - said[0]).norm() < 1e-3 * said[0].norm()
    else:
        torch.testing.assert_close(together, said, rtol=0, atol=1e-11)
        torch.testing.assert_close(parts[0][1], latents, rtol=0, atol=1e-6)


def test_one_rank_that_is_told_to_stop_stops_its_group_after_the_same_chunk(found):
    ranks = [rank["stopped"] for rank in found[2]]
    assert [count for count, _, _ in ranks] == [1, 1] and [decoded for _, _, decoded in ranks] == [True, False]
    count, latents, _ = stopped(Mesh())
    assert count == 3 and all(torch.allclose(own, latents, atol=1e-5) for _, own, _ in ranks)


def test_the_bench_counts_the_ranks_and_one_of_them_reports(found):
    (rows, lines), (_, silent) = (rank["measured"] for rank in found[2])
    assert rows[0]["processes"] == 2 and rows[0]["gpus"] == 0 and rows[0]["denoise_fps"] > 0 and lines and not silent
    with pytest.raises(InputError, match="for one process, not for 2"):
        bench_generate(GenerateSettings(model="tiny"), None, print, compare=("steps=2", "steps=1"), mesh=Mesh(sp_size=2))


def test_what_ranks_cannot_share_is_refused():
    def rollout(sp_size, frames, **options):
        settings, size = RolloutSettings(chunk_frames=frames, window_frames=3 * frames, sink_frames=0), {"token_height": 1, "token_width": 2, "batch": 1}
        return Rollout(toy_dit(), settings, **size, device="cpu", dtype=torch.float64, mesh=Mesh(sp_size=sp_size), **options)

    with pytest.raises(ConfigError, match=r"attention heads\(4\) % sequence parallel size\(8\) = 4"):
        rollout(8, 8)
    with pytest.raises(InputError, match=r"film frames\(6\) % ranks\(4\) = 2"):
        rollout(4, 6)
    with pytest.raises(InputError, match="2 ranks share are not recorded"):
        rollout(2, 4, fixed=True)
    with pytest.raises(InputError, match=r"sp_size\(2\) x dp_size\(1\) = 2 processes make films with torchrun"):
        Pipeline.load(default_config("tiny", ["sp_size=2"]))
    pipeline = random_pipeline()
    pipeline.device, pipeline.cuda_graphs = torch.device("cuda"), True
    assert pipeline.records(1)
    pipeline.mesh = Mesh(sp_size=2)
    assert not pipeline.records(1)


def test_groups_of_ranks():
    assert group_sizes(4, 2, 2) == [2, 2] and group_sizes(1, 1, 1) == [1]
    assert group_sizes(7, 4, 3, remainder=True, shares=8) == [4, 2, 1] and group_sizes(8, 4, 3, remainder=True, shares=8) == [4, 4]
    assert group_sizes(7, 4, 9, remainder=True, shares=4) == [4, 2, 1]
    assert [group_of(rank, [4, 2, 1]) for rank in (0, 3, 4, 5, 6)] == [(0, 0), (0, 3), (1, 0), (1, 1), (2, 0)]
    with pytest.raises(ConfigError, match=r"sp_size\(4\) x dp_size\(1\) = 4 != WORLD_SIZE\(2\)"):
        group_sizes(2, 4, 1)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE\(7\) - 4 - 2 = 1, not 0"):
        group_sizes(7, 4, 2, remainder=True, shares=8)


def uneven():
    """Groups of 2 and 1: what each rank hears of its group."""
    with film_mesh([2, 1], "cpu") as mesh:
        told = mesh.any(mesh.sp_rank == 1), mesh.largest(torch.tensor([float(mesh.sp_rank)])).item()
        return (mesh.dp_rank, mesh.dp_size, mesh.sp_rank, mesh.sp_size), told


def test_groups_of_uneven_size(tmp_path):
    assert run_ranks(uneven, 3, tmp_path) == [((0, 2, 0, 2), (True, 1.0)), ((0, 2, 1, 2), (True, 1.0)), ((1, 2, 0, 1), (False, 0.0))]
