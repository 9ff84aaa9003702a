"""A rollout over two ranks with quantised layers and pages: cuts, a given first frame and a LoRA; what one rank with all heads and tokens computes."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from sp_toys import DIMS, HEIGHT, WIDTH, toy_dit

from longlive.cache.attend import Cached
from longlive.cache.policy import WindowPolicy, history
from longlive.cache.quantised import QuantisedPages
from longlive.core.tokens import Tokens
from longlive.models.lora import attach, branches
from longlive.models.patch import patchify
from longlive.models.spec import TINY
from longlive.parallel.mesh import Mesh
from longlive.parallel.shard import Layout
from longlive.parallel.ulysses import Ulysses
from longlive.precision.backends import BACKENDS
from longlive.precision.converter import LinearConverter, share_activation_scales
from longlive.train.low_precision import largest_of

FRAMES, CHUNKS, BATCH = 4, 4, 2
CUTS = [False, False, True, False]
CASES = list(itertools.product(("fp8", "w4a16", "emulated"), ("nvfp4", "fp8")))


def network(linear, mesh):
    dit = toy_dit().float()
    LinearConverter(backend=BACKENDS[linear]).convert(dit, TINY)
    share_activation_scales(dit, largest_of(mesh))
    attach(dit, TINY, rank=2, generator=torch.Generator().manual_seed(3))
    for _, branch in branches(dit):
        torch.nn.init.normal_(branch.b, std=0.1, generator=torch.Generator().manual_seed(4))
    return dit.requires_grad_(False)


def chunk_tokens(chunk, shots):
    position = chunk * FRAMES + 3.0 * shots + torch.arange(FRAMES, dtype=torch.float64)
    prompt = torch.arange(BATCH)[:, None]
    return Tokens(position.expand(BATCH, -1), torch.full((FRAMES,), chunk), torch.ones(FRAMES, dtype=torch.bool), prompt, HEIGHT // 2, WIDTH // 2)


@torch.no_grad()
def rollout(mesh, linear, format):
    """A denoising forward and the commit of every chunk; the first frame of the film is given, so that its level is 0. This rank's velocities."""
    dit, generator = network(linear, mesh), torch.Generator().manual_seed(1)
    text = dit.text([torch.randn(3, DIMS.text_dim, generator=generator) for _ in range(BATCH)])
    layout, size = Layout(film=FRAMES, ranks=mesh.sp_size), (FRAMES * HEIGHT * WIDTH // 4, DIMS.heads // mesh.sp_size, DIMS.head_dim)
    keep = {"keep_anchor": True, "keep_pin": True}
    pages = QuantisedPages(DIMS.layers, BATCH, 3, *size, device=torch.device("cpu"), dtype=torch.float32, format=format, **keep)
    out = []
    for chunk, windows in enumerate(history(CUTS, WindowPolicy(pages=3, anchor=True, pin=True))):
        tokens = chunk_tokens(chunk, sum(CUTS[: chunk + 1]))
        own = layout.shard_tokens(tokens, mesh.sp_rank)
        x_BNc = layout.shard(patchify(torch.randn(BATCH, FRAMES, DIMS.channels, HEIGHT, WIDTH, generator=generator)), mesh.sp_rank)
        level = torch.full((BATCH, FRAMES), 0.7, dtype=torch.float64)
        if chunk == 0:
            level[:, 0] = 0
        level = level[:, mesh.sp_rank * own.frames : (mesh.sp_rank + 1) * own.frames]
        for window, commit in zip(windows, (False, True)):
            attend = Ulysses(Cached(pages, [window] * BATCH, chunk, tokens, DIMS.head_dim, commit=commit), mesh)
            y = dit(x_BNc, own, torch.zeros_like(level) if commit else level, text, attend, until="kv" if commit else "velocity")
            out += [] if commit else [y]
    return torch.stack(out)


def everything():
    mesh = Mesh.launch(2, "cpu")
    return {case: rollout(mesh, *case) for case in CASES} | {"group": dist.get_backend()}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(everything, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_two_ranks_make_the_film_of_one(found, case):
    """Scales belong to rows, heads, or a shared largest value: what is left is rounding, and the few codes that it tips over."""
    alone = rollout(Mesh(), *case)
    both = torch.cat([f[case] for f in found], dim=2)
    assert both.shape == alone.shape
    error = (both - alone).norm() / alone.norm()
    assert error < 0.02 and (both[0] - alone[0]).norm() < 0.01 * alone[0].norm()
