"""`algorithm.regression_steps`: before films are told apart by scores, the student learns the guided teacher's answers where it leaves the solver."""

import pytest
import torch
from dmd_toys import distillation as settings
from dmd_toys import draw_of, gradients, toy_task
from train_toys import shrink_tiny

from longlive.config import load_config
from longlive.core.errors import ConfigError
from longlive.models import spec
from longlive.train import distillation
from longlive.train.optim import guarded_step
from longlive.train.players import Player
from longlive.train.state import parts

START = {"regression_steps": 3, "same_step_across_blocks": False}


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    monkeypatch.setitem(spec.MODELS, "tiny", spec.TINY)
    shrink_tiny()


@pytest.mark.parametrize("finish", [False, True])
@pytest.mark.parametrize("i2v", [False, True])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, finish, i2v):
    """Cached rollouts through windows, pins, cuts and exits of their own ask what one teacher-forced forward answers: without guidance there is no loss."""
    task = toy_task(tmp_path, algorithm=START | {"real_guidance_scale": 0.0, "i2v": i2v}, training={"finish_chunks": finish, "num_training_frames": 48})
    for number in range(3):
        step = task.batch(draw_of(task, number, 0))
        assert (step.films.first_B1CHW is not None) == i2v
        loss, seen = task.loss(step)
        assert 0 <= loss < 1e-8 and set(seen) == {"distance"}, (number, float(loss))
    told = toy_task(tmp_path, algorithm=START | {"real_guidance_scale": 1.5})
    assert told.loss(told.batch(draw_of(told, 0, 0)))[0] > 1e-4


def test_the_loss_is_that_of_guided_velocities(tmp_path, monkeypatch):
    """Against the teacher's prompted and unprompted answers, combined by hand; early chunks without gradients do not count."""
    task = toy_task(tmp_path, algorithm=START, training={"slice_last_frames": 8})
    step, answered = task.batch(draw_of(task, 1, 0)), []
    scoring = task._score
    monkeypatch.setattr(task, "_score", lambda voice, *given: answered.append((voice, scoring(voice, *given))) or answered[-1][1])
    rolled = task._rolled(step)
    loss, _ = task._answer_loss(step, rolled)
    (voice, velocity), f = answered[0], 8
    assert len(answered) == 1 and voice is task.cast.teacher
    with_prompt, without = velocity.chunk(2)
    wanted = with_prompt + 1.5 * (with_prompt - without)
    levels = torch.tensor([task.schedule.sigmas[exit] for exit in step.exits.steps]).repeat_interleave(f)[None, :, None, None, None]
    mine = (rolled.asked_BFCHW - rolled.x_BFCHW) / levels
    by_hand = (mine - wanted)[:, -f:].square().mean()
    assert by_hand > 1e-4
    torch.testing.assert_close(loss.float(), by_hand.float(), rtol=1e-4, atol=1e-7)


def test_the_student_comes_closer_and_then_scores_take_over(tmp_path):
    task = toy_task(tmp_path, algorithm=START | {"regression_steps": 6}, training={"lr": 3.0e-3, "ema_weight": 0.0})
    player, losses = Player(task.roles[0]), []
    for _ in range(6):
        loss, _ = task.loss(task.batch(draw_of(task, 0, 0)))
        loss.backward()
        guarded_step(parts(player.optimizer), torch.zeros(()))
        player.optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    _, seen = task.loss(task.batch(draw_of(task, 6, 0)))
    assert set(seen) == {"dmdtrain_gradient_norm", "distance"}


def test_the_critic_learns_as_ever(tmp_path):
    ours, plain = (gradients(toy_task(tmp_path, algorithm={"regression_steps": n}), 1) for n in (3, 0))
    assert ours[0] == plain[0] and all(torch.equal(ours[1][name], plain[1][name]) for name in plain[1])


@pytest.mark.parametrize(
    "sections",
    [
        {"algorithm": {"real_score_mask": "causal"}},
        {"algorithm": {"teacher_forcing": False}},
        {"training": {"streaming_frames": 64}},
        {"algorithm": {"backward_simulation": False}, "data": {"data_path": "somewhere"}},
    ],
)
def test_what_it_needs_is_said_before_weights_are_read(tmp_path, sections):
    with pytest.raises(ConfigError, match="regression_steps"):
        load_config(settings(tmp_path, **{**sections, "algorithm": {"regression_steps": 3} | sections.get("algorithm", {})}))


def test_recomputed_activations_know_who_spoke(tmp_path):
    """The teacher has spoken when the student's blocks are recomputed."""
    kept, recomputed = (toy_task(tmp_path, algorithm=START, infra={"gradient_checkpointing": again}) for again in (False, True))
    for task in (kept, recomputed):
        for branch in task.cast.student.all_branches:
            torch.nn.init.normal_(branch.b, std=0.1, generator=torch.Generator().manual_seed(1))
    (loss, ours), (other, theirs) = (gradients(task, 0) for task in (kept, recomputed))
    assert loss == other and any(gradient.abs().max() > 0 for gradient in ours.values())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-7)


def test_a_given_frame_and_early_chunks_do_not_count(tmp_path, monkeypatch):
    task, seen = toy_task(tmp_path, algorithm=START | {"i2v": True}, training={"slice_last_frames": 8}), []
    monkeypatch.setattr(distillation, "velocity_loss", lambda mine, wanted, mask_BF: seen.append(mask_BF) or (mine - wanted).square().mean())
    step = task.batch(draw_of(task, 1, 0))
    task.loss(step)
    (mask_BF,) = seen
    whole = toy_task(tmp_path, algorithm=START | {"i2v": True})
    whole.loss(whole.batch(draw_of(whole, 1, 0)))
    assert mask_BF[:, -8:].all() and not mask_BF[:, :-8].any() and not seen[1][:, 0].any() and seen[1][:, 1:].all()
