"""Error recycling (spec training §4): what is put into a step, what is kept of it, and that both go on exactly after a stop."""

import random

import pytest
import torch

from longlive.config import load_config
from longlive.config.training import ErrorRecycling
from longlive.core.errors import CheckpointError, ConfigError
from longlive.diffusion.flow import train_table
from longlive.parallel.mesh import Mesh
from longlive.train.error_buffer import BufferSizes, ErrorBuffer
from longlive.train.objective import flow_target, know_first_frames, mix, per_frame
from longlive.train.recycling import LATENT, NOISE, Recycler, buffer_sizes, check_memory, merged_states, reachable_bytes, recycler

TABLE = train_table(5.0)
ENTRY = (2, 3, 2, 2)  # two latent frames of three channels in a chunk
CHUNKS, FRAMES = 4, 8
ALWAYS = {"enabled": True, "clean_prob": 0.0, "noise_prob": 1.0, "latent_prob": 1.0, "context_prob": 1.0, "modulate_factor": 0.0, "num_buckets": 5}


def recycler_of(mesh=Mesh(), **settings):
    given = ErrorRecycling(**{**ALWAYS, **settings})
    return Recycler(given, sigmas=TABLE.sigmas, entry=ENTRY, chunks=CHUNKS, device=torch.device("cpu"), mesh=mesh)


def batch(seed=0, samples=2, valid=(FRAMES, FRAMES)):
    g = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(samples, FRAMES, 3, 2, 2, generator=g) for _ in range(2))
    index = torch.randint(1000, (samples, CHUNKS), generator=g)
    mask = (torch.arange(FRAMES)[None] < torch.tensor(valid[:samples])[:, None]).float()
    return clean, noise, index, flow_target(clean, noise, index, TABLE, mask)


def fill(r, latent=0.0, noise=0.0):
    """One entry of that value for every level and position."""
    for kind, value in ((LATENT, latent), (NOISE, noise)):
        for chunk in range(CHUNKS):
            for index in range(0, 1000, 200):
                r.buffers[kind].add(torch.full(ENTRY, value), index, random.Random(0), chunk)


def host(seed=0):
    return torch.Generator().manual_seed(seed)


def test_errors_enter_noise_latents_and_history_as_documented():
    r = recycler_of(skip_block_0=True)
    fill(r, latent=0.5, noise=-0.25)
    clean, noise, index, flow = batch()
    shown = r.perturb(0, host(), clean, [flow], [index], clean)
    sigma = per_frame(TABLE.sigmas[index], 2)  # that of the table: a timestep in bfloat16 would be off by up to ten entries
    assert torch.equal(shown.sigma_BF[0], sigma)
    torch.testing.assert_close(shown.flows[0].noisy_BFCHW, mix(clean + 0.5, noise - 0.25, sigma))
    torch.testing.assert_close(shown.flows[0].target_BFCHW, noise - 0.25 - clean)
    assert torch.equal(shown.context_BFCHW[:, :2], clean[:, :2])
    torch.testing.assert_close(shown.context_BFCHW[:, 2:], clean[:, 2:] + 0.5)
    assert shown.shares == {"er_clean": 0.0, "er_noise": 1.0, "er_latent": 1.0, "er_context": 1.0}


def test_an_error_stays_within_its_noise_level_and_position():
    r = recycler_of(enable_position_bucketing=True, noise_prob=0.0, context_prob=1.0)
    for chunk in range(CHUNKS):
        for bucket in range(5):
            r.buffers[LATENT].add(torch.full(ENTRY, 10.0 * chunk + bucket), 200 * bucket, random.Random(0), chunk)
    clean, _, index, flow = batch()
    shown = r.perturb(0, host(), clean, [flow], [index], clean)
    sigma = per_frame(TABLE.sigmas[index], 2)[..., None, None, None]
    put = ((shown.flows[0].noisy_BFCHW - flow.noisy_BFCHW) / (1 - sigma))[:, ::2, 0, 0, 0]
    want = 10.0 * torch.arange(CHUNKS) + index // 200
    assert torch.allclose(put, want, rtol=0.02, atol=0.02)
    history = (shown.context_BFCHW - clean)[:, ::2, 0, 0, 0]
    assert torch.equal((history + 0.5) // 10, torch.arange(4.0).expand(2, 4))


def test_the_given_image_stays_clean():
    r = recycler_of()
    fill(r, 1.0, 1.0)
    clean, _, index, flow = batch()
    flow = know_first_frames(flow, clean, torch.tensor([1, 0]))
    shown = r.perturb(0, host(), clean, [flow], [index], clean)
    assert torch.equal(shown.flows[0].noisy_BFCHW[0, 0], clean[0, 0]) and shown.flows[0].target_BFCHW[0, 0].abs().max() == 0
    assert torch.equal(shown.context_BFCHW[0, 0], clean[0, 0])
    assert not torch.equal(shown.context_BFCHW[1, 0], clean[1, 0]) and not torch.equal(shown.context_BFCHW[0, 1], clean[0, 1])


@pytest.mark.parametrize("settings", [{"start_step": 3}, {"clean_prob": 1.0}, {"noise_prob": 0.0, "latent_prob": 0.0, "context_prob": 0.0}, {"empty": True}])
def test_nothing_is_put_in(settings):
    settings = dict(settings)
    empty = settings.pop("empty", False)
    r = recycler_of(**settings)
    if not empty:
        fill(r, 1.0, 1.0)
    clean, _, index, flow = batch()
    shown = r.perturb(2, host(), clean, [flow], [index], clean)
    for ours, given in ((shown.flows[0].noisy_BFCHW, flow.noisy_BFCHW), (shown.flows[0].target_BFCHW, flow.target_BFCHW), (shown.context_BFCHW, clean)):
        assert torch.equal(ours, given)


def test_coins_fall_as_often_as_configured():
    r = recycler_of(clean_prob=0.2, noise_prob=0.1, latent_prob=0.9, context_prob=0.5, clean_buffer_update_prob=0.25)
    fill(r)
    clean, _, index, flow = batch()
    sums, stored = {}, 0.0
    for step in range(500):
        shown = r.perturb(step, host(step), clean, [flow], [index], clean)
        sums = {name: sums.get(name, 0) + share / 500 for name, share in shown.shares.items()}
        stored += sum(shown.store_B) / 1000
    want = {"er_clean": 0.2, "er_noise": 0.08, "er_latent": 0.72, "er_context": 0.4}
    assert all(abs(sums[name] - want[name]) < 0.05 for name in want) and abs(stored - 0.85) < 0.05


def test_what_is_kept_is_the_error_of_the_answer():
    r = recycler_of()
    fill(r, latent=0.5)
    clean, noise, index, flow = batch()
    shown = r.perturb(0, host(), clean, [flow], [index], clean)
    velocity = torch.randn(clean.shape, generator=host(5))
    r.buffers = recycler_of().buffers
    columns = r.observe(0, shown, [velocity])
    assert columns["er_entries"] == 8
    sigma = per_frame(TABLE.sigmas[index], 2)[..., None, None, None]
    latent = (shown.flows[0].noisy_BFCHW - sigma * velocity - clean).bfloat16()
    wrong = ((1 - sigma) * (velocity - (noise - clean))).bfloat16()
    for kind, errors in ((LATENT, latent), (NOISE, wrong)):
        chunks = errors.unflatten(1, (CHUNKS, 2)).flatten(0, 1)
        order = sorted(range(8), key=lambda n: (int(index.flatten()[n]) // 200, n % CHUNKS, n))  # by bucket, then as they came
        assert torch.equal(r.buffers[kind].state_dict()["entries"], chunks[order])


def test_padding_wild_answers_and_given_frames_do_not_enter():
    r = recycler_of()
    clean, noise, index, flow = batch(valid=(4, 8))
    flow = know_first_frames(flow, clean, torch.tensor([1, 0]))
    velocity = torch.ones_like(clean)
    velocity[1, 7] = torch.inf
    r.observe(0, r.perturb(0, host(), clean, [flow], [index], clean), [velocity])
    assert len(r.buffers[LATENT]) == len(r.buffers[NOISE]) == 2 + 3
    entries = r.buffers[NOISE].state_dict()["entries"]
    assert entries.isfinite().all() and (entries.flatten(2).abs().amax(2) == 0).sum() == 1  # the given frame, and nothing else


def test_clean_samples_are_kept_as_often_as_configured():
    clean, _, index, flow = batch()
    for probability, count in ((0.0, 0), (1.0, 8)):
        r = recycler_of(clean_prob=1.0, clean_buffer_update_prob=probability)
        r.observe(0, r.perturb(0, host(), clean, [flow], [index], clean), [clean])
        assert len(r.buffers[LATENT]) == count


def run_steps(r, first, last):
    seen = []
    for step in range(first, last):
        clean, _, index, flow = batch(step)
        shown = r.perturb(step, host(step), clean, [flow], [index], clean)
        seen += [shown.flows[0].noisy_BFCHW, shown.context_BFCHW, shown.flows[0].target_BFCHW]
        r.observe(step, shown, [torch.randn(clean.shape, generator=host(100 + step))])
    return seen


@pytest.mark.parametrize("replacement", ["random", "fifo", "l2"])
@pytest.mark.parametrize("positions", [False, True])
def test_a_resumed_run_repeats_the_uninterrupted_one(replacement, positions, tmp_path):
    settings = {"replacement_strategy": replacement, "enable_position_bucketing": positions, "max_size_per_bucket": 3, "modulate_factor": 0.3}
    whole = recycler_of(**settings, clean_prob=0.2)
    run_steps(whole, 0, 8)
    torch.save(whole.state_dict(), tmp_path / "buffers.pt")
    later = recycler_of(**settings, clean_prob=0.2)
    later.load_state_dict(torch.load(tmp_path / "buffers.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(run_steps(whole, 8, 12), run_steps(later, 8, 12)))
    assert whole.buffers[LATENT].counts == later.buffers[LATENT].counts and max(whole.buffers[LATENT].counts.values()) == 3


def test_shares_of_a_buffer_merge_and_load_on_other_ranks():
    whole = ErrorBuffer(BufferSizes(buckets=7, capacity=2, entry=(1,), positions=2), modulate=0.0, replacement="random")
    parts = [ErrorBuffer(BufferSizes(buckets=7, capacity=2, entry=(1,), positions=2, rank=n, ranks=4), modulate=0.0, replacement="random") for n in range(4)]
    draws = [random.Random(0) for _ in range(5)]
    for n in range(60):
        for buffer, rng in zip((whole, *parts), draws):
            buffer.add(torch.tensor([float(n)]), 37 * n % 1000, rng, n % 3)
    for n in range(20):
        picks = {buffer.pick_any(rng, n % 2) for buffer, rng in zip((whole, *parts), draws)}
        assert len(picks) == 1 and whole.values(picks) == sum(part.values(picks) for part in parts)
    states = [{LATENT: part.state_dict(), NOISE: part.state_dict()} for part in parts]
    state = merged_states(states[::-1])[LATENT]
    assert torch.equal(state["entries"], whole.state_dict()["entries"]) and sum(len(s[LATENT]["entries"]) for s in states) == len(state["entries"])
    for ranks in (1, 2, 3):
        for rank in range(ranks):
            other = ErrorBuffer(BufferSizes(buckets=7, capacity=2, entry=(1,), positions=2, rank=rank, ranks=ranks), modulate=0.0, replacement="random")
            other.load_state_dict(state)
            assert other.counts == whole.counts and all(not other.holds(k) or torch.equal(*held(k, other, whole)) for k in whole.counts)
    with pytest.raises(CheckpointError, match="share 1 of 4"):
        parts[0].load_state_dict(parts[1].state_dict())
    with pytest.raises(CheckpointError, match="all of them are needed"):
        merged_states(states[1:])
    with pytest.raises(CheckpointError, match="buckets 7 there, 8 here"):
        ErrorBuffer(BufferSizes(buckets=8, capacity=2, entry=(1,), positions=2), modulate=0.0, replacement="random").load_state_dict(state)


def held(key, *buffers):
    from longlive.train.error_buffer import Pick

    return [buffer.values([Pick(key, place, 1.0) for place in range(buffer.counts[key])]) for buffer in buffers]


def test_memory_is_stated_up_front_and_refused_where_it_is_not_there():
    settings = ErrorRecycling(enabled=True)
    full = 2 * buffer_sizes(settings, (8, 48, 44, 80), 12).nbytes
    assert full == 2 * 50 * 500 * 8 * 48 * 44 * 80 * 2 == 135_168_000_000
    shared = [buffer_sizes(settings, (8, 48, 44, 80), 12, Mesh(sp_rank=n, sp_size=4)).nbytes for n in range(4)]
    assert 2 * sum(shared) == full
    config = load_config("configs/train_ar.yaml", ["training.error_recycling.enabled=true"])
    assert reachable_bytes(config, (8, 48, 44, 80), 12, 1) == 2 * 600 * 12 * 8 * 48 * 44 * 80 * 2
    assert reachable_bytes(config, (8, 48, 44, 80), 12, 3) == 2 * (600 + 2 * 51) * 12 * 8 * 48 * 44 * 80 * 2
    with pytest.raises(ConfigError, match=r"grow to 200 GB, and it has 64 GB; lower training.error_recycling.max_size_per_bucket\(500\)"):
        check_memory(200e9, 64 * 10**9, 500)
    check_memory(10e9, 64 * 10**9, 500)


def test_a_configuration_makes_a_recycler_and_says_its_bytes(caplog):
    size = ["data.image_or_video_shape=[1,16,48,2,4]", "model_kwargs.model_name=tiny", "model_kwargs.num_frame_per_block=8"]
    config = load_config({}, [*size, "training.error_recycling.enabled=true", "training.error_recycling.max_size_per_bucket=2", "training.max_iters=10"])
    assert recycler(load_config({}, size), 2, Mesh(), torch.device("cpu")) is None
    with caplog.at_level("INFO", logger="longlive"):
        made = recycler(config, 2, Mesh(), torch.device("cpu"))
    assert made.buffers[LATENT].sizes.entry == (8, 48, 2, 4) and len(made.buffers[LATENT].counts) == 50
    assert "at most 0.00 GB in this run" in caplog.text
