"""Defects of the published trainer (spec training §9.1) that ours must not have: for each a check that passes, and that fails where the defect is put in."""

import os
import random
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from dit_toys import DIMS, FRAMES, ask, film, film_tokens, toy_dit, toy_noise, toy_prompts, toy_rollout
from train_toys import losses, shrink_tiny, training, write_vae

from longlive.cache import attend as strategies
from longlive.cache.attend import Cached, TeacherForced, visible_tensor
from longlive.cache.policy import WindowPolicy
from longlive.config import keys, load_config
from longlive.config import load as config_load
from longlive.config.aliases import INERT_IN_ROLLOUTS, WITHOUT_EFFECT
from longlive.core.errors import ConfigError
from longlive.data import manifest, sampling
from longlive.data import open as data_open
from longlive.data.sampling import SamplingRules
from longlive.diffusion.flow import train_table
from longlive.models import spec, wan_dit
from longlive.ops.attention import attention
from longlive.ops.masks import dense_mask
from longlive.ops.rope import apply_rope, rope_tables
from longlive.parallel import ulysses
from longlive.parallel.shard import Layout
from longlive.train import checkpoint, objective, run, run_files, sharded
from longlive.train.objective import FlowTarget, masked_mean

SOURCE = Path(__file__).resolve().parents[2] / "longlive"
FAILS = (AssertionError, pytest.fail.Exception, TypeError, RuntimeError)  # pytest.fail: an error that was expected did not come


def doubled(chunks, dit, visible=None, seed=3):
    """A training forward over [clean; noisy] with a prompt for each chunk."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(chunks * FRAMES).double()[None]
    tokens = film_tokens(torch.arange(chunks)[None], position, 2)
    z = torch.randn(1, 2 * chunks * FRAMES, DIMS.channels, 4, 6, dtype=torch.float64, generator=generator)
    sigma = torch.rand(1, 2 * chunks * FRAMES, dtype=torch.float64, generator=generator)
    return ask(dit, z, tokens, sigma, dit.text(toy_prompts(chunks)), TeacherForced(tokens, DIMS.head_dim, visible)), tokens


def d1_training_after_an_evaluation(folder):
    dit = toy_dit()
    before = doubled(4, dit)[0]
    with torch.no_grad():
        film(toy_rollout(dit, 1), dit.text(toy_prompts(4)), toy_noise(1, 4))
    assert torch.equal(doubled(4, dit)[0], before)


def d1_defect(patch):
    """A grid that any cached forward leaves behind, and that tells cross-attention that its sequence is one film."""
    init, forward, grid = Cached.__init__, wan_dit.CrossAttention.forward, []

    def leave(self, *arguments, **options):
        grid.append(True)
        init(self, *arguments, **options)

    def mistake(self, h_BND, prompt_BG, kv, bias_RM):
        half = prompt_BG.shape[1] // 2
        return forward(self, h_BND, prompt_BG[:, :half].repeat_interleave(2, 1) if grid and half else prompt_BG, kv, bias_RM)

    patch.setattr(Cached, "__init__", leave)
    patch.setattr(wan_dit.CrossAttention, "forward", mistake)


class TwoRanks:
    """One of two ranks that share a sample, without processes: sums are taken from what the other one gave before."""

    sp_size = size = 2
    sp_group = None

    def __init__(self, rank, given):
        self.sp_rank, self.given, self.taken = rank, given, 0
        given[rank].clear()

    def sum(self, tensor):
        own, other = self.given[self.sp_rank], self.given[1 - self.sp_rank]
        own.append(tensor.detach().clone())
        return own[-1] + (other[len(own) - 1] if len(other) >= len(own) else 0)


def d4_the_gradient_of_a_masked_loss(folder):
    generator = torch.Generator().manual_seed(0)
    target, base = (torch.randn(1, 8, 2, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    weight, mask = torch.rand(1, 8, dtype=torch.float64, generator=generator), (torch.arange(8) < 5).double()[None]
    flow, factor = FlowTarget(target, target, weight, weight, mask), torch.ones((), dtype=torch.float64, requires_grad=True)
    masked_mean((factor * base - target).square().mean((2, 3, 4)), weight, mask).backward()
    whole, layout, given = factor.grad.clone(), Layout(film=8, streams=2, ranks=2), [[], []]
    for rank in (0, 1, 0, 1):  # the second time every rank knows what the other one holds
        factor.grad = factor.grad if rank else None
        own = (factor * base)[:, 4 * rank : 4 * rank + 4]
        sharded.sharded_loss(own, [flow], TwoRanks(rank, given), layout)[0].backward()
    torch.testing.assert_close(factor.grad / 2, whole)


def d4_defect(patch):
    """Divided by the valid frames of the group, then averaged over its ranks."""
    patch.setattr(sharded, "global_mean", lambda total, count, mesh: total / mesh.sum(count))


def d10_levels_are_told_exactly(folder):
    table = train_table(5.0)
    index = torch.arange(1000)[None]
    flow = objective.flow_target(torch.zeros(1, 1000, 1, 1, 1), torch.ones(1, 1000, 1, 1, 1), index, table)
    told = 1000 * flow.sigma_BF
    torch.testing.assert_close(told, table.timesteps[index].double(), rtol=1e-12, atol=0)
    assert torch.equal((told[..., None] - table.timesteps.double()).abs().argmin(-1), index)
    torch.testing.assert_close(flow.noisy_BFCHW.flatten().double(), told.flatten() / 1000, rtol=1e-6, atol=1e-7)
    network, waves = toy_dit(torch.bfloat16), []
    network.time_embedding.register_forward_pre_hook(lambda module, given: waves.append(given[0]))
    tokens = film_tokens(torch.zeros(1, 2, dtype=torch.int64), torch.arange(2 * FRAMES).double()[None], 1)
    latents, sigma = torch.zeros(1, 2 * FRAMES, DIMS.channels, 4, 6), flow.sigma_BF[:, 100 : 100 + 2 * FRAMES]
    with torch.no_grad():
        ask(network, latents, tokens, sigma, network.text(toy_prompts(1)), TeacherForced(tokens, DIMS.head_dim))
    angle = 1000 * sigma[..., None] * 10000.0 ** -(torch.arange(DIMS.freq_dim // 2, dtype=torch.float64) / (DIMS.freq_dim // 2))
    assert torch.equal(waves[0], torch.cat((angle.cos(), angle.sin()), -1).bfloat16())  # the angle is exact, its cosine is rounded


def d10_defect(patch):
    exact = objective.flow_target

    def rounded(*arguments, **options):
        flow = exact(*arguments, **options)
        return replace(flow, sigma_BF=(1000 * flow.sigma_BF).bfloat16().double() / 1000)

    patch.setattr(objective, "flow_target", rounded)


class Masked:
    """Attention under the dense mask of the sequence that it is given."""

    def __init__(self, tokens, visible=None):
        self.mask, self.rope = dense_mask(tokens, visible), rope_tables(tokens, DIMS.head_dim)

    def __call__(self, q, k, v, layer):
        return attention(apply_rope(q, *self.rope), apply_rope(k, *self.rope), v, self.mask, kernel="math")


def d11_films_of_other_lengths(folder):
    """One batch size, three lengths, two rules of visibility, with and without noisy copies: each as its own mask has it."""
    for chunks, copies, windowed in ((4, 2, False), (2, 2, False), (3, 1, False), (3, 2, True), (3, 2, False)):
        generator = torch.Generator().manual_seed(chunks)
        tokens = film_tokens(torch.zeros(1, chunks, dtype=torch.int64), torch.arange(chunks * FRAMES).double()[None], copies)
        q, k, v = (torch.randn(1, tokens.frames * tokens.frame_tokens, 2, DIMS.head_dim, dtype=torch.float64, generator=generator) for _ in range(3))
        visible = visible_tensor([[False] * chunks], WindowPolicy(pages=2, anchor=True, pin=False)) if windowed else None
        found, wanted = (strategy(q, k, v, 0) for strategy in (TeacherForced(tokens, DIMS.head_dim, visible), Masked(tokens, visible)))
        torch.testing.assert_close(found, wanted)


def d11_defect(patch):
    """What may be read is kept by batch size."""
    plan, kept = strategies._Plan.reads, {}
    patch.setattr(strategies._Plan, "reads", lambda self, visible: kept.setdefault(self.tokens.position_BF.shape[0], plan(self, visible)))


def d13_a_checkpoint_to_start_from(folder):
    shrink_tiny()
    world = ["data.data_path=null", "world.clips=2", "world.chunks=2", "training.ema_weight=0.9", "training.log_iters=1"]
    config = load_config(training("", write_vae(folder)), world)
    run(config.with_overrides(["training.max_iters=2"]), folder / "old")
    old = checkpoint.folders(folder / "old")[-1]
    run(config.with_overrides([f"checkpoints.generator_ckpt={old}", "training.max_iters=1", "training.lr=1e-9"]), folder / "new")
    (new,) = checkpoint.folders(folder / "new")
    assert len(losses(folder / "new")) == 1 and checkpoint.step_of(new) == 1
    step = next(name for name in checkpoint.sizes_in(new) if name.startswith("generator_optimizer.step."))
    assert checkpoint.read_sharded(new, {step: checkpoint.sizes_in(new)[step]})[step] == 1


def d13_defect(patch):
    """The checkpoint that lends its weights is resumed from."""
    newest = run_files.RunFiles._newest
    patch.setattr(run_files.RunFiles, "_newest", lambda self: Path(given) if (given := self.config["checkpoints"]["generator_ckpt"]) else newest(self))


@contextmanager
def listing(reverse):
    """A host whose file system lists a folder in this order."""
    scan = os.scandir

    @contextmanager
    def ordered(place):
        with scan(place) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.name, reverse=reverse))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest.os, "scandir", ordered)
        yield


def d15_hosts_agree_on_folders(folder):
    for name in ("b", "a", "c"):
        (folder / "video" / name).mkdir(parents=True)
        for clip in ("10", "2"):
            (folder / "video" / name / f"{clip}.mp4").write_bytes(b"x")
    orders = []
    for reverse in (False, True):
        with listing(reverse):
            orders.append([found.video for found in manifest._videos(folder)])
    assert orders[0] == orders[1] == [f"video/{name}/{clip}.mp4" for name in "abc" for clip in (2, 10)]


def d15_defect(patch):
    patch.setattr(manifest, "sorted", lambda entries, key=None: list(entries), raising=False)


def d15_passes_differ(folder):
    orders = [tuple(sampling.folder_of(7, turn * 12 + place, 12) for place in range(12)) for turn in range(3)]
    assert len(set(orders)) == 3 and all(sorted(order) == list(range(12)) for order in orders)


def d15_epochs_defect(patch):
    order = sampling.shuffled
    patch.setattr(sampling, "shuffled", lambda seed, turn, count: order(seed, 0, count))


@dataclass(frozen=True)
class Clip:
    frames: int
    fps: float = 24.0


def d16_starts_leave_room_for_virtual_cuts(folder):
    rules = SamplingRules(chunks=8, max_chunks_per_shot=4)
    assert not any(sampling.feasible_starts([Clip(260)], rules))
    assert all(len(sampling.draw_segments([Clip(290)], rules, random.Random(n))) == 8 for n in range(50))


def d16_defect(patch):
    feasible = sampling.feasible_starts
    patch.setattr(sampling, "feasible_starts", lambda clips, rules: feasible(clips, replace(rules, max_chunks_per_shot=0)))


def d17_training_has_the_configured_prefix(folder):
    rules = data_open.sampling_rules(load_config(training("", ""), ["data.scene_cut_prefix='Now '"]))
    segments = sampling.walk([Clip(40), Clip(40)], rules)
    assert sampling.prompts_and_cuts(segments, ["a", "b"], rules)[0] == ("a", "Now b")


def d17_defect(patch):
    patch.setattr(data_open, "SamplingRules", lambda scene_cut_prefix, **rest: SamplingRules(**rest))


def d21_a_list_of_film_lengths(folder):
    assert load_config(training("", ""), ["evaluation.num_frames=[16,8]", "model_kwargs.num_frame_per_block=8"]).evaluation.num_frames == (16, 8)


def d21_defect(patch):
    tuples = config_load._tuples
    patch.setattr(config_load, "_tuples", lambda value: int(value) if isinstance(value, list) else tuples(value))


def d22_every_key_is_read(folder):
    """By code outside the schema: or it is refused, said to have no effect, or can have one value only. (Keys of quantised training are refused.)"""
    schema = {"training.py", "model.py", "quant.py", "generation.py", "root.py", "world.py"}
    code = "\n".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py") if not (path.parent.name == "config" and path.name in schema))
    sections = ("infra", "algorithm", "training", "data", "evaluation", "logging", "checkpoints", "model_kwargs")
    wanted = {key: field for key, field in keys.schema_keys().items() if key.split(".")[0] in sections and "_quant" not in key}
    assert len(wanted) > 100
    excused = WITHOUT_EFFECT.keys() | INERT_IN_ROLLOUTS.keys() | {key for key, field in wanted.items() if len(get_args(field.annotation)) == 1}
    excused |= {key for key, field in wanted.items() if field.annotation is type(None)}
    unread = [key for key in wanted if key not in excused and not re.search(rf"\.{key.rpartition('.')[2]}\b", code)]
    assert not unread


def d22_defect(patch):
    known = keys.schema_keys()
    patch.setattr(keys, "schema_keys", lambda: known | {"training.nobody_reads_this": known["training.lr"]})


def d24_heads_that_ranks_cannot_share(folder):
    strategy = ulysses.Ulysses(lambda q, k, v, layer: v, TwoRanks(0, [[], []]))
    with pytest.raises(ConfigError, match=r"attention heads\(3\) % sequence parallel size\(2\) = 1, not 0"):
        strategy(*(torch.zeros(1, 4, 3, 2) for _ in range(3)), 0)


def d24_defect(patch):
    patch.setattr(ulysses, "check_heads", lambda heads, ranks: None)


def d25_queries_and_keys_learn(folder):
    """The gradients of self-attention's q and k are those of rotation written as complex numbers."""
    dit = toy_dit()
    out, tokens = doubled(3, dit)
    (out * out.detach().cos()).sum().backward()
    found = [getattr(dit.blocks[0].self_attn, name).weight.grad for name in "qk"]
    dit.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(1, 2 * 3 * FRAMES, DIMS.channels, 4, 6, dtype=torch.float64, generator=generator)
    sigma = torch.rand(1, 2 * 3 * FRAMES, dtype=torch.float64, generator=generator)
    cos, sin = rope_tables(tokens, DIMS.head_dim)
    mask = dense_mask(tokens, None)

    def turned(x):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double()).unsqueeze(2)).flatten(-2)

    wanted = ask(dit, z, tokens, sigma, dit.text(toy_prompts(3)), lambda q, k, v, layer: attention(turned(q), turned(k), v, mask, kernel="math"))
    (wanted * wanted.detach().cos()).sum().backward()
    for name, gradient in zip("qk", found):
        expected = getattr(dit.blocks[0].self_attn, name).weight.grad
        assert expected.abs().max() > 1e-3 and gradient is not None
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


def d25_defect(patch):
    """A rotation without a backward."""
    rotate = strategies.apply_rope
    patch.setattr(strategies, "apply_rope", lambda x, cos, sin: rotate(x.detach(), cos, sin))


DEFECTS = {
    "D1": (d1_training_after_an_evaluation, d1_defect),
    "D4": (d4_the_gradient_of_a_masked_loss, d4_defect),
    "D10": (d10_levels_are_told_exactly, d10_defect),
    "D11": (d11_films_of_other_lengths, d11_defect),
    "D13": (d13_a_checkpoint_to_start_from, d13_defect),
    "D15 hosts": (d15_hosts_agree_on_folders, d15_defect),
    "D15 passes": (d15_passes_differ, d15_epochs_defect),
    "D16": (d16_starts_leave_room_for_virtual_cuts, d16_defect),
    "D17": (d17_training_has_the_configured_prefix, d17_defect),
    "D21": (d21_a_list_of_film_lengths, d21_defect),
    "D22": (d22_every_key_is_read, d22_defect),
    "D24": (d24_heads_that_ranks_cannot_share, d24_defect),
    "D25": (d25_queries_and_keys_learn, d25_defect),
}


@pytest.fixture(autouse=True)
def own_models(monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)


@pytest.mark.parametrize("name", DEFECTS)
def test_ours_is_free_of(name, tmp_path):
    DEFECTS[name][0](tmp_path)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_check_would_see(name, tmp_path, monkeypatch):
    check, defect = DEFECTS[name]
    defect(monkeypatch)
    with pytest.raises(FAILS):
        check(tmp_path)
