"""Error recycling over 4 ranks, as 1 x 4, 2 x 2 and 4 x 1 of (dp, sp): ranks that share samples draw what one rank would draw, and warm-up tells all ranks."""

import pytest
import torch
from ranks import run_ranks

from longlive.config.training import ErrorRecycling
from longlive.diffusion.flow import train_table
from longlive.parallel.mesh import Mesh
from longlive.train.objective import flow_target
from longlive.train.recycling import LATENT, Recycler, merged_states, whole_velocities
from longlive.train.sharded import film_layout

TABLE, ENTRY, CHUNKS, FRAMES, STEPS, WARM = train_table(5.0), (2, 3, 2, 2), 4, 8, 6, 2


def steps(mesh):
    """What this rank showed its network at every step, how full its buffers were, and their state."""
    settings = ErrorRecycling(enabled=True, num_buckets=6, max_size_per_bucket=24, noise_prob=0.5, buffer_warmup_iter=WARM)
    r = Recycler(settings, sigmas=TABLE.sigmas, entry=ENTRY, chunks=CHUNKS, device=torch.device("cpu"), mesh=mesh)
    layout, seen, counts, given = film_layout(FRAMES, 2, mesh), [], [], {}
    for step in range(STEPS):
        g = torch.Generator().manual_seed(10 * step + mesh.dp_rank)
        clean, *noises = (torch.randn(1, FRAMES, 3, 2, 2, generator=g) for _ in range(3))
        index = [torch.randint(1000, (1, CHUNKS), generator=g) for _ in noises]
        flows = [flow_target(clean, noise, i, TABLE) for noise, i in zip(noises, index)]
        shown = r.perturb(step, g, clean, flows, index, clean)
        answers = [torch.randn(clean.shape, generator=g) for _ in flows]
        shard = layout.shard_streams(answers, mesh.sp_rank, skip=1)
        whole = whole_velocities(shard, mesh, layout)
        assert all(torch.equal(a, b) for a, b in zip(whole, answers))
        r.observe(step, shown, whole)
        seen.append([shown.context_BFCHW, *(flow.noisy_BFCHW for flow in shown.flows), *(flow.target_BFCHW for flow in shown.flows)])
        counts.append(dict(r.buffers[LATENT].counts))
        given = {name: given.get(name, 0) + share for name, share in shown.shares.items()}
    return {"seen": seen, "counts": counts, "state": r.state_dict(), "given": given, "mesh": (mesh.dp_rank, mesh.sp_rank)}


def every_grid():
    return {sp_size: steps(Mesh.launch(sp_size, "cpu")) for sp_size in (1, 2, 4)}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(every_grid, 4, tmp_path_factory.mktemp("ranks"))


def test_four_ranks_of_one_sample_are_one(found):
    alone = steps(Mesh())
    assert all(alone["given"][name] > 0 for name in ("er_noise", "er_latent", "er_context"))
    for rank in found:
        ours = rank[4]
        assert ours["counts"] == alone["counts"]
        assert all(torch.equal(a, b) for x, y in zip(ours["seen"], alone["seen"]) for a, b in zip(x, y))
    shares = [rank[4]["state"] for rank in found]
    assert torch.equal(merged_states(shares)[LATENT]["entries"], alone["state"][LATENT]["entries"])
    assert max(len(share[LATENT]["entries"]) for share in shares) < len(alone["state"][LATENT]["entries"])


def test_pairs_of_ranks_equal_the_two_ranks_of_pure_data_parallelism(found):
    """dp ranks 0 and 1 of 2 x 2: both ranks of a pair saw the same, and different things from the other pair."""
    by_place = {rank[2]["mesh"]: rank[2] for rank in found}
    for dp in range(2):
        first, second = by_place[dp, 0], by_place[dp, 1]
        assert first["counts"] == second["counts"] and all(torch.equal(a, b) for x, y in zip(first["seen"], second["seen"]) for a, b in zip(x, y))
    assert not torch.equal(by_place[0, 0]["seen"][-1][0], by_place[1, 0]["seen"][-1][0])


def test_warm_up_tells_all_ranks(found):
    for dp, sp_size in ((4, 1), (2, 2)):
        runs = [rank[sp_size] for rank in found]
        for step in range(WARM + 1):
            assert len({tuple(run["counts"][step].values()) for run in runs}) == 1
        assert sum(runs[0]["counts"][0].values()) > sum(found[0][4]["counts"][0].values())
        assert len({tuple(run["counts"][-1].values()) for run in runs}) == dp
