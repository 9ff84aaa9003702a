"""Backward simulation: the film that generation makes, gradients of one step of each chunk and of no earlier one, whatever is recomputed."""

from dataclasses import replace

import pytest
import torch
from dit_toys import FRAMES, film, toy_dit, toy_noise, toy_prompts, toy_rollout
from lora_toys import SPEC, toy_adapter

from longlive.diffusion.flow import add_noise
from longlive.diffusion.known import KnownFrames
from longlive.engine.rollout import RolloutSettings
from longlive.evaluation.parity.dmd import _Leaking
from longlive.models.lora import add, branches
from longlive.train.cast import Merged, Stepper, Voice
from longlive.train.compiled import checkpoint_blocks
from longlive.train.simulation import Exits, Recorded, Script, Stepping, StudentRollout

SETTINGS = RolloutSettings(chunk_frames=FRAMES, window_frames=3 * FRAMES, sink_frames=FRAMES, shot_offset=3.0, steps=2)
CUTS = [[False, False, True, False, False, False], [False, True, False, False, True, False]]
CHUNKS, BATCH = 6, 2
LAST = SETTINGS.steps - 1


def script(batch=BATCH, cuts=CUTS, chunks=CHUNKS):
    return Script(cuts_Bc=[row[:chunks] for row in cuts[:batch]], prompt_Bc=torch.arange(batch * chunks).reshape(batch, chunks))


def text_of(dit, batch=BATCH, chunks=CHUNKS):
    return dit.text([prompt.to(dit.patch_embedding.weight.dtype) for prompt in toy_prompts(batch * chunks)])


def noise(dtype=torch.float64, batch=BATCH, chunks=CHUNKS):
    return toy_noise(batch, chunks).flatten(1, 2).to(dtype)


def simulated(dit, settings=SETTINGS, steps=(LAST,) * CHUNKS, first=0, **options):
    rollout = StudentRollout(dit, settings)
    return rollout.run(noise(), script(), text_of(dit), Exits(steps=steps, first_with_gradients=first), **options).x_BFCHW


def gradients(dit, x, weigh=None):
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    found = torch.autograd.grad((x * probe * (1 if weigh is None else weigh)).sum(), list(dit.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(dit.parameters(), found)]


VARIANTS = {
    "window, sinks, cuts": {},
    "no sink": {"sink_frames": 0},
    "relative": {"relative": True},
    "recache": {"recache": True},
    "everything seen": {"window_frames": 6 * FRAMES},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("known", [0, 1])
def test_the_film_of_all_steps_is_the_film_of_generation(variant, known):
    """Also shot offsets, pins and windows of each sample's own (D9), and the commit at level 0 (D20)."""
    dit, settings = toy_dit(), replace(SETTINGS, **VARIANTS[variant])
    given = KnownFrames(toy_noise(BATCH, 1, seed=8)[:, 0, :1]) if known else None
    rollout = toy_rollout(dit, BATCH, **VARIANTS[variant])
    with torch.no_grad():
        text = text_of(dit)
    rows = [list(range(CHUNKS)), list(range(CHUNKS, 2 * CHUNKS))]
    made = film(rollout, text, toy_noise(BATCH, CHUNKS), rows, CUTS, known=given).flatten(1, 2)
    x = simulated(dit, settings, known=None if given is None else KnownFrames(given.z_BFCHW.double()))
    torch.testing.assert_close(x.detach(), made.double(), rtol=0, atol=2e-6)  # generation samples in float32


def test_a_sample_does_not_depend_on_the_cuts_of_another():
    dit, x = toy_dit(), simulated(toy_dit())
    rollout = StudentRollout(dit, SETTINGS)
    one = Script(cuts_Bc=CUTS[1:], prompt_Bc=torch.arange(CHUNKS, 2 * CHUNKS)[None])
    alone = rollout.run(noise()[1:], one, text_of(dit), Exits(steps=(LAST,) * CHUNKS)).x_BFCHW
    torch.testing.assert_close(alone, x[1:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_activations_changes_no_gradient(variant):
    settings = replace(SETTINGS, **VARIANTS[variant])
    kept, recomputed = toy_dit(), toy_dit()
    checkpoint_blocks(list(recomputed.blocks))
    exits = (1, 0, 1, 1, 0, 1)
    ours, theirs = (gradients(dit, simulated(dit, settings, exits)) for dit in (recomputed, kept))
    assert any(g.abs().max() > 0 for g in theirs)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_no_gradient_crosses_a_chunk():
    """What the last chunk teaches is the same whether earlier chunks had gradients or not (D3)."""
    dit = toy_dit()
    last = torch.zeros(1, CHUNKS * FRAMES, 1, 1, 1, dtype=torch.float64)
    last[:, -FRAMES:] = 1
    everywhere = gradients(dit, simulated(dit), last)
    only_last = gradients(dit, simulated(dit, first=CHUNKS - 1), last)
    for a, b in zip(everywhere, only_last):
        assert torch.equal(a, b)
    # each chunk adds its own
    whole = gradients(dit, simulated(dit))
    parts = [torch.zeros_like(g) for g in whole]
    for chunk in range(CHUNKS):
        own = torch.zeros_like(last)
        own[:, chunk * FRAMES : (chunk + 1) * FRAMES] = 1
        parts = [p + g for p, g in zip(parts, gradients(dit, simulated(dit), own))]
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_what_the_defects_would_do():
    """The checks above are seen to fail: on a cache that keeps its graph (D3), on a commit at the last level of the training table (D20)."""
    dit, last = toy_dit(), torch.zeros(1, CHUNKS * FRAMES, 1, 1, 1, dtype=torch.float64)
    last[:, -FRAMES:] = 1
    one = Script(cuts_Bc=CUTS[:1], prompt_Bc=torch.arange(CHUNKS)[None])

    def leaking(first):
        written = {}
        rollout = StudentRollout(dit, SETTINGS, wrap=lambda attend: _Leaking(attend, written))
        return gradients(dit, rollout.run(noise()[:1], one, text_of(dit), Exits(steps=(LAST,) * CHUNKS, first_with_gradients=first)).x_BFCHW, last)

    clean = gradients(dit, StudentRollout(dit, SETTINGS).run(noise()[:1], one, text_of(dit), Exits(steps=(LAST,) * CHUNKS)).x_BFCHW, last)
    assert max((a - b).abs().max() for a, b in zip(leaking(0), clean)) > 1e-3
    x = simulated(dit).detach()
    noised = simulated(dit, before_commit=lambda number, z: add_noise(z, torch.ones_like(z), torch.tensor(0.00498))).detach()
    assert torch.equal(x[:, :FRAMES], noised[:, :FRAMES]) and (x - noised).abs().max() > 1e-4  # of a tolerance of 2e-6


def test_exits_and_where_gradients_begin():
    dit = toy_dit()
    x = simulated(dit, steps=(0, 1, 0, 1, 0, 1), first=2)
    assert x.requires_grad
    early = torch.zeros(1, CHUNKS * FRAMES, 1, 1, 1, dtype=torch.float64)
    early[:, : 2 * FRAMES] = 1
    assert all(g.abs().max() == 0 for g in gradients(dit, x, early))
    with torch.no_grad():
        assert torch.equal(simulated(dit, steps=(0, 1, 0, 1, 0, 1)), x.detach())


@pytest.mark.parametrize("variant", VARIANTS)
def test_finished_chunks_are_those_of_generation_whatever_their_exit(variant):
    dit, settings, exits = toy_dit(), replace(SETTINGS, **VARIANTS[variant]), (0, 1, 0, 0, 1, 0)
    rollout = StudentRollout(dit, settings)
    rolled = rollout.run(noise(), script(), text_of(dit), Exits(steps=exits, finish=True))
    whole = simulated(dit, settings)
    torch.testing.assert_close(rolled.read_BFCHW, whole.detach(), rtol=0, atol=1e-9)
    late = [chunk for chunk, step in enumerate(exits) if step == LAST]
    frames = [chunk * FRAMES + f for chunk in late for f in range(FRAMES)]
    torch.testing.assert_close(rolled.x_BFCHW[:, frames], whole[:, frames], rtol=0, atol=1e-9)
    assert rolled.x_BFCHW.requires_grad and not rolled.read_BFCHW.requires_grad
    assert (rolled.x_BFCHW - rolled.read_BFCHW)[:, :FRAMES].abs().max() > 1e-3


def test_a_rollout_goes_on_in_segments():
    """Persistent memory: what later segments see, and what they teach, is what one long rollout gives them."""
    dit, rollout = toy_dit(), StudentRollout(toy_dit(), SETTINGS)
    rollout.dit, exits = dit, (1, 0, 1, 1, 0, 1)
    whole = simulated(dit, steps=exits)
    parts, text = [], text_of(dit)
    for first, last in ((0, 2), (2, 3), (3, 6)):
        part = Script(cuts_Bc=[row[first:last] for row in CUTS], prompt_Bc=script().prompt_Bc[:, first:last])
        parts.append(rollout.run(noise()[:, first * FRAMES : last * FRAMES], part, text, Exits(steps=exits[first:last]), more=last < 6).x_BFCHW)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    late = torch.zeros(1, CHUNKS * FRAMES, 1, 1, 1, dtype=torch.float64)
    late[:, 3 * FRAMES :] = 1
    ours, theirs = (gradients(dit, x, late) for x in (torch.cat(parts, dim=1), whole))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def with_lora():
    dit = toy_dit().requires_grad_(False)
    add(dit, SPEC, toy_adapter("generator"))
    for _, branch in branches(dit):
        branch.requires_grad_(True)
    return dit


def test_a_lora_student_has_shot_offsets():
    """D2: the offset reaches the network that has a LoRA on it."""
    dit = with_lora()
    merged = toy_dit()
    tensors = Merged(dit, "generator", {f"base_model.model.{n}.lora_{s}.weight": p for n, b in branches(dit) for s, p in (("A", b.a), ("B", b.b))})
    for name, parameter in merged.named_parameters():
        parameter.data.copy_(tensors[name])
    x = simulated(dit).detach()
    torch.testing.assert_close(x, simulated(merged).detach(), rtol=0, atol=1e-6)  # weights are merged in float32
    still = simulated(dit, replace(SETTINGS, shot_offset=0.0)).detach()
    assert torch.equal(x[:, : 1 * FRAMES], still[:, : 1 * FRAMES]) and (x - still)[0, 2 * FRAMES :].abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_steps_are_the_same_steps(variant):
    """Rollout after rollout in the same pages, films, exits and gradients included; recording itself is a GPU's (tests/gpu)."""
    dit, settings = toy_dit(), replace(SETTINGS, **VARIANTS[variant])
    recorded = Recorded(dit, torch.device("cpu"))
    exits = ((LAST,) * CHUNKS, (0, 1, 0, 0, 1, 1), (LAST,) * CHUNKS)
    for steps in exits:
        plain, again = simulated(dit, settings, steps), simulated(dit, settings, steps, stepper=Stepping(dit, text_of(dit), recorded))
        torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-9)
        for a, b in zip(gradients(dit, again), gradients(dit, plain)):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    made = len(recorded.forwards.forwards)
    with torch.no_grad():
        simulated(dit, settings, exits[0], stepper=Stepping(dit, text_of(dit), recorded))
    assert made == len(recorded.forwards.forwards) <= 2 * 2 * CHUNKS and len(recorded._pages) == 1


def test_a_copy_is_told_each_noise_level_once(monkeypatch):
    """A rollout has one for each step and the commit's; given frames make others of the first chunk."""
    dit, asked = toy_dit(), []
    levels = type(dit).levels
    monkeypatch.setattr(type(dit), "levels", lambda self, sigma: asked.append(sigma) or levels(self, sigma))
    given = KnownFrames(toy_noise(BATCH, 1, seed=8)[:, 0, :1])
    for stepping in (Stepping(dit, text_of(dit)), Stepping(dit, text_of(dit), Recorded(dit, torch.device("cpu")))):
        for known, count in ((None, SETTINGS.steps + 1), (given, 2 * (SETTINGS.steps + 1))):
            with torch.no_grad():
                plain = simulated(dit, known=known)
                asked.clear()
                x = simulated(dit, known=known, stepper=stepping)
            assert len(asked) == count
            torch.testing.assert_close(x, plain, rtol=1e-9, atol=1e-9)


def test_steps_without_gradients_on_a_merged_copy():
    dit = with_lora()
    voice = Voice(dit, "generator", "causal", [branch for _, branch in branches(dit)])
    stepper = Stepper(voice, torch.float64)
    x = simulated(dit, steps=(1, 1, 0, 1, 1, 0))
    merged = simulated(dit, steps=(1, 1, 0, 1, 1, 0), stepper=Stepping(stepper.current(), text_of(stepper.dit)))
    torch.testing.assert_close(merged, x, rtol=0, atol=1e-5)
    own = [p for p in dit.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(v.square().sum(), own) for v in (merged, x))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    before = [p.clone() for p in stepper.dit.parameters()]
    stepper.current()
    assert all(torch.equal(a, b) for a, b in zip(before, stepper.dit.parameters()))
    with torch.no_grad():
        voice.all_branches[0].b.add_(0.1)
    assert not all(torch.equal(a, b) for a, b in zip(before, stepper.current().parameters()))
