"""Training and generation read the same keys: teacher forcing, the dense mask and the paged rollout agree."""

import itertools

import pytest
import torch
from dit_toys import COLUMNS, DIMS, FRAMES, ROWS, ask, film, film_tokens, toy_dit, toy_noise, toy_prompts, toy_rollout

from longlive.cache.attend import Cached, TeacherForced, visible_tensor
from longlive.core.errors import ConfigError, InputError
from longlive.core.tokens import Tokens
from longlive.diffusion.known import KnownFrames
from longlive.diffusion.samplers import unipc
from longlive.engine.rollout import RolloutSettings, chunk_noise
from longlive.models.patch import patchify
from longlive.ops.attention import attention
from longlive.ops.masks import dense_mask
from longlive.ops.rope import apply_rope, rope_tables

CHUNKS = 7
CUTS = [[c in (2, 5) for c in range(CHUNKS)], [c == 3 for c in range(CHUNKS)]]
PROMPTS = [[0, 0, 1, 1, 1, 2, 2], [3, 3, 3, 4, 4, 4, 4]]
MODES = {
    "window": {},
    "no sink": {"sink_frames": 0},
    "recache": {"recache": True},
    "single shot": {"multi_shot": False},
    "relative": {"relative": True},
    "relative recache": {"relative": True, "recache": True},
    "scaled time": {"t_scale": 0.75},
    "all visible": {"window_frames": CHUNKS * FRAMES},
    "all visible, relative": {"window_frames": CHUNKS * FRAMES, "relative": True},
}


class Oracle:
    """Attention under the dense mask."""

    def __init__(self, tokens, visible=None, committed=None):
        self.mask = dense_mask(tokens, visible, committed)
        self.rope = rope_tables(tokens, DIMS.head_dim)

    def __call__(self, q, k, v, layer):
        return attention(apply_rope(q, *self.rope), apply_rope(k, *self.rope), v, self.mask, kernel="math")


def training_positions(cuts, offset):
    shots = torch.tensor(cuts).cumsum(1).double() * offset
    return shots.repeat_interleave(FRAMES, 1) + torch.arange(CHUNKS * FRAMES).double()


def training_inputs(copies=3, batch=2, seed=7):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, copies * CHUNKS * FRAMES, DIMS.channels, 2 * ROWS, 2 * COLUMNS, dtype=torch.float64, generator=generator)
    sigma = torch.rand(batch, copies * CHUNKS, generator=generator, dtype=torch.float64).repeat_interleave(FRAMES, 1)
    return z, sigma


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("windows", ["all", "window", "recache"])
def test_dense_calls_equal_the_mask_and_its_gradients(copies, windows):
    dit = toy_dit()
    tokens = film_tokens(torch.tensor(PROMPTS), training_positions(CUTS, 3.0), copies)
    visible = committed = None
    if windows != "all":
        policy = toy_rollout(dit, 2, recache=windows == "recache").settings.policy
        visible, committed = visible_tensor(CUTS, policy), visible_tensor(CUTS, policy, commit=True)
    z, sigma = training_inputs(copies)
    results = []
    for attend in (TeacherForced(tokens, DIMS.head_dim, visible, committed_BCP=committed), Oracle(tokens, visible, committed)):
        dit.zero_grad()
        out = ask(dit, z, tokens, sigma, dit.text(toy_prompts(5)), attend)
        (out * z.cos()).sum().backward()
        results.append((out.detach(), dit.blocks[0].self_attn.k.weight.grad.clone()))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-9)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_teacher_forcing_equals_the_rollout(mode):
    """One training forward over all chunks gives the velocity that every sampler step of the rollout saw; cuts differ per sample."""
    dit, noise, steps = toy_dit(), toy_noise(2, CHUNKS), []
    rollout = toy_rollout(dit, 2, **MODES[mode])
    with torch.no_grad():
        text = dit.text(toy_prompts(5))
        clean = film(rollout, text, noise, PROMPTS, CUTS, on_step=lambda i, x, v: steps.append((x, v)))
        settings, schedule = rollout.settings, unipc(2, 5.0)
        policy = settings.policy
        starts = [noise, torch.stack([x for x, _ in steps[::2]], 1)]
        tokens = film_tokens(torch.tensor(PROMPTS), training_positions(CUTS, settings.shot_offset), 3)
        attend = TeacherForced(
            tokens,
            DIMS.head_dim,
            None if mode.startswith("all") else visible_tensor(CUTS, policy),
            committed_BCP=visible_tensor(CUTS, policy, commit=True) if settings.recache else None,
            t_scale=settings.t_scale,
            relative=settings.relative,
        )
        z = torch.cat([t.flatten(1, 2).double() for t in (clean, *starts)], dim=1)
        levels = [0.0, *(schedule.model_sigma(i) for i in range(2))]
        sigma = torch.tensor(levels, dtype=torch.float64).repeat_interleave(CHUNKS * FRAMES).expand(2, -1)
        velocity = ask(dit, z, tokens, sigma, text, attend).unflatten(1, (3, CHUNKS, FRAMES))
    for i in range(2):
        told = torch.stack([v for _, v in steps[i::2]], 1)
        assert torch.allclose(velocity[:, i + 1].float(), told, atol=1e-5), (velocity[:, i + 1] - told).abs().max()


def test_unequal_chunks_and_wrong_layouts():
    dit = toy_dit()
    position = torch.arange(5).double()[None]
    tokens = Tokens(position, torch.tensor([0, 1, 1, 2, 2]), torch.zeros(5, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64), ROWS, COLUMNS)
    z, text = training_inputs(1, 1)[0][:, :5], dit.text(toy_prompts(1))
    outs = [ask(dit, z, tokens, torch.full((1, 1), 0.4), text, a) for a in (TeacherForced(tokens, DIMS.head_dim), Oracle(tokens))]
    assert torch.allclose(*outs, atol=1e-10)
    with pytest.raises(InputError, match="one size"):
        TeacherForced(tokens, DIMS.head_dim, torch.zeros(1, 3, 1, dtype=torch.int64))
    with pytest.raises(InputError, match="same chunks"):
        TeacherForced(Tokens(position, tokens.chunk_F, tokens.chunk_F == 1, tokens.prompt_BG, ROWS, COLUMNS), DIMS.head_dim)


@pytest.mark.parametrize("mode", ["window", "recache", "relative recache"])
def test_a_batch_equals_its_samples_alone(mode):
    dit, noise = toy_dit(), toy_noise(2, CHUNKS)
    text = dit.text(toy_prompts(5))
    together = film(toy_rollout(dit, 2, **MODES[mode]), text, noise, PROMPTS, CUTS)
    for b in range(2):
        alone = film(toy_rollout(dit, 1, **MODES[mode]), text, noise[b : b + 1], PROMPTS[b : b + 1], CUTS[b : b + 1])
        assert torch.allclose(together[b], alone[0], atol=1e-6)


def test_guidance_batched_equals_two_passes_and_changes_the_film():
    dit, noise = toy_dit(), toy_noise(2, 4)
    text = dit.text(toy_prompts(5))
    films = [film(toy_rollout(dit, 2, guidance=g, batched_guidance=b), text, noise, negative=4) for g, b in ((3.0, True), (3.0, False), (1.0, True))]
    assert torch.allclose(films[0], films[1], atol=1e-5)
    assert (films[0] - films[2]).abs().max() > 0.1
    with pytest.raises(InputError, match="negative prompt"):
        film(toy_rollout(dit, 2, guidance=3.0), text, noise)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
def test_known_frames_stay_and_are_seen(count):
    dit, noise = toy_dit(), toy_noise(1, 4)
    text = dit.text(toy_prompts(4))
    given = torch.randn(1, count, DIMS.channels, 2 * ROWS, 2 * COLUMNS)
    out = film(toy_rollout(dit, 1), text, noise, known=KnownFrames(given)).flatten(1, 2)
    assert torch.equal(out[:, :count], given)
    plain = film(toy_rollout(dit, 1), text, noise).flatten(1, 2)
    assert ((out - plain)[:, count:].abs().amax() > 1e-3) == (count > 0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_model_is_shown_known_frames_clean_at_every_step(guidance):
    dit, asked = toy_dit(), []
    text, given = dit.text(toy_prompts(2)), torch.randn(2, 1, DIMS.channels, 2 * ROWS, 2 * COLUMNS)
    rollout = toy_rollout(dit, 2, guidance=guidance, steps=3)

    class Spy:
        dims, level_stamp = DIMS, dit.level_stamp

        def levels(self, sigma_BF):
            return sigma_BF

        def __call__(self, x_BNc, tokens, sigma_BF, *rest):
            asked.append((x_BNc, sigma_BF))
            return dit(x_BNc, tokens, sigma_BF, *rest)

    rollout.dit = rollout.levels.dit = Spy()
    rollout.step(toy_noise(2, 1)[:, 0], text, [0, 0], [False, False], negative=1, known=KnownFrames(given))
    assert len(asked) == 4  # three steps and the commit
    for x_BNc, sigma_BF in asked:
        assert torch.equal(x_BNc[:, : ROWS * COLUMNS], patchify(given).repeat(len(x_BNc) // 2, 1, 1)) and (sigma_BF[:, 0] == 0).all()
    assert [bool((sigma_BF[:, 1:] > 0).all()) for _, sigma_BF in asked] == [True, True, True, False]


def test_extending_a_film_by_its_own_frames_continues_it():
    """Known frames that the rollout itself made, and the same noise: the rest comes out the same."""
    dit, noise = toy_dit(), toy_noise(1, 4)
    text = dit.text(toy_prompts(4))
    out = film(toy_rollout(dit, 1), text, noise)
    again = film(toy_rollout(dit, 1), text, noise, known=KnownFrames(out[:, :2].flatten(1, 2)))
    assert torch.allclose(out, again, atol=1e-6)


@pytest.mark.parametrize("relative", [False, True])
def test_snapshot_is_exact_and_repeatable(relative):
    dit, noise = toy_dit(), toy_noise(1, 6)
    text = dit.text(toy_prompts(6))
    rollout = toy_rollout(dit, 1, relative=relative)
    film(rollout, text, noise[:, :4])
    memory = [t.data_ptr() for t in rollout.stores[0].k]
    snapshot = rollout.snapshot()
    cuts = [True]
    first = [rollout.step(noise[:, c], text, [c], cuts) for c in (4, 5)]
    rollout.restore(snapshot)
    second = [rollout.step(noise[:, c], text, [c], cuts) for c in (4, 5)]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert memory == [t.data_ptr() for t in rollout.stores[0].k]


def test_a_step_that_raised_can_be_repeated():
    dit, noise = toy_dit(), toy_noise(1, 4)
    text = dit.text(toy_prompts(4))
    want = film(toy_rollout(dit, 1), text, noise)
    rollout = toy_rollout(dit, 1)
    film(rollout, text, noise[:, :3])

    def stop(step, x, v):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout.step(noise[:, 3], text, [3], [False], on_step=stop)
    assert torch.equal(rollout.step(noise[:, 3], text, [3], [False]), want[:, 3])


def test_20000_latent_frames():
    """No table, no longest film: a start far away gives the same film, and a film of 20,000 frames stays finite."""
    dit, noise = toy_dit(), toy_noise(1, 5)
    text = dit.text(toy_prompts(5))
    near = film(toy_rollout(dit, 1), text, noise)
    for start in (1020.0, 20000.0, 20476.0):  # two of them step over a multiple of 1024, the end of a table
        far = film(toy_rollout(dit, 1, first_frame=start), text, noise)
        assert torch.allclose(near, far, atol=1e-4), (start, (near - far).abs().max())
    frames = 100
    rollout = toy_rollout(toy_dit(torch.float32), 1, chunk_frames=frames, window_frames=3 * frames, sink_frames=frames, steps=1)
    text = rollout.dit.text(toy_prompts(1))
    with torch.no_grad():
        for chunk in range(20000 // frames):
            z = rollout.step(toy_noise(1, 1, chunk, frames)[:, 0], text, [0], [chunk % 50 == 49])
    assert z.isfinite().all() and rollout.state.chunk == 200 and rollout.state.windows[0].slots[0] == 0


def test_gradients_stay_inside_the_chunk_and_survive_later_writes():
    """With gradients on the pages are constants: same numbers, a gradient for the own chunk only, and nothing is overwritten."""
    dit = toy_dit()
    with torch.no_grad():
        text = dit.text(toy_prompts(4))
    for relative, cut in itertools.product((False, True), (False, True)):
        rollout = toy_rollout(dit, 2, relative=relative, recache=cut)
        noise = toy_noise(2, 4)
        film(rollout, text, noise[:, :3], cuts=[[False, False, cut]] * 1 + [[False] * 3])
        policy = rollout.settings.policy
        windows = [policy.open(w, 3) for w in rollout.state.windows]
        tokens = Tokens(
            torch.arange(6, 8).double().expand(2, -1), torch.full((2,), 3), torch.ones(2, dtype=torch.bool), torch.tensor([[3], [3]]), ROWS, COLUMNS
        )
        before = rollout.stores[0].snapshot()
        options = {"relative": relative}
        z, sigma = noise[:, 3].double().requires_grad_(), torch.full((2, 2), 0.9)
        graph = Cached(rollout.stores[0], windows, 3, tokens, DIMS.head_dim, **options)
        out = ask(dit, z, tokens, sigma, text, graph)
        assert all(torch.equal(a, b) for a, b in zip(before, rollout.stores[0].snapshot()))
        with torch.no_grad():
            plain = Cached(rollout.stores[0], windows, 3, tokens, DIMS.head_dim, **options)
            assert torch.allclose(out, ask(dit, z, tokens, sigma, text, plain), atol=1e-10)
        out.sum().backward()
        assert z.grad.abs().sum() > 0


def test_settings_that_cannot_work_are_refused_with_the_equation():
    with pytest.raises(InputError, match=r"sink_size\(4\) != num_frame_per_block\(8\)"):
        RolloutSettings(sink_frames=4)
    with pytest.raises(InputError, match=r"local_attn_size\(12\) % num_frame_per_block\(8\)"):
        RolloutSettings(window_frames=12)
    with pytest.raises(InputError, match="sampling_steps"):
        RolloutSettings(steps=0)
    assert RolloutSettings(window_frames=-1).pages == 3


def test_wrong_shapes_are_refused():
    dit = toy_dit()
    rollout, text = toy_rollout(dit, 1), dit.text(toy_prompts(1))
    with pytest.raises(InputError, match="noise of shape"):
        rollout.step(toy_noise(1, 1, frames=3)[:, 0], text, [0], [False])
    with pytest.raises(InputError, match="2 prompts"):
        rollout.step(toy_noise(1, 1)[:, 0], text, [0, 0], [False])


def test_bfloat16_rollout_stays_close():
    noise = toy_noise(1, 3)
    films = []
    for dtype in (torch.float32, torch.bfloat16):
        dit = toy_dit(torch.float32).to(dtype)
        films.append(film(toy_rollout(dit, 1), dit.text(toy_prompts(3)), noise))
    assert films[1].dtype == torch.float32
    assert (films[0] - films[1]).norm() / films[0].norm() < 0.1


def test_noise_depends_on_its_arguments_alone():
    shape = (2, 3, 4, 4)
    assert torch.equal(chunk_noise(1, 2, 0, 3, shape), chunk_noise(1, 2, 0, 3, shape))
    draws = [chunk_noise(*a, shape) for a in ((1, 2, 0, 3), (2, 2, 0, 3), (1, 3, 0, 3), (1, 2, 1, 3), (1, 2, 0, 4), (1, 20, 3, 0))]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))
    wide = chunk_noise(0, 0, 0, 0, (8, 48, 24, 40))
    assert abs(wide.mean()) < 0.01 and abs(wide.std() - 1) < 0.01
    assert patchify(wide[None]).shape == (1, 8 * 240, 192)


def test_embeddings_of_noise_levels_are_made_once_and_again_when_weights_change():
    dit, noise = toy_dit(), toy_noise(1, 4)
    text, rollout = dit.text(toy_prompts(4)), toy_rollout(dit, 1, steps=2)
    made, real = [], dit.levels
    dit.levels = lambda sigma: made.append(sigma) or real(sigma)
    for chunk in range(3):
        rollout.step(noise[:, chunk], text, [0], [False])
    assert len(made) == 3  # two steps and the commit
    with torch.no_grad():
        dit.time_projection[1].bias.add_(1.0)
    fresh = toy_rollout(dit, 1, steps=2)
    fresh.restore(rollout.snapshot())
    out = rollout.step(noise[:, 3], text, [0], [False])
    assert len(made) == 6 and torch.equal(fresh.step(noise[:, 3], text, [0], [False]), out)


def test_attention_in_fp8_is_near_and_only_where_nothing_is_masked():
    dit, noise = toy_dit(torch.float32), toy_noise(2, 5)
    text = dit.text(toy_prompts(5))
    cuts = [[False] * 5, [False, False, True, False, False]]  # with a recache the windows of the two differ, so that keys are masked
    plain, low = (film(toy_rollout(dit, 2, recache=True, attention=kernel), text, noise, cuts=cuts) for kernel in ("auto", "fp8"))
    error = (low - plain).norm() / plain.norm()
    assert 1e-5 < error < 0.05
    with pytest.raises(ConfigError, match="takes no bias"):
        attention(*torch.randn(3, 1, 4, 2, 8), torch.ones(1, 1, 1, 4, dtype=torch.bool), kernel="fp8")
