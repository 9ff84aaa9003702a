"""Rollouts of distillation whose steps without gradients are CUDA graphs: the films and gradients of plain ones, again and again."""

import pytest
import torch
from dit_toys import FRAMES, toy_dit, toy_noise, toy_prompts

from longlive.engine.rollout import RolloutSettings
from longlive.train.simulation import Exits, Recorded, Script, Stepping, StudentRollout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE, CHUNKS, BATCH, STEPS = torch.device("cuda"), 6, 2, 3
SETTINGS = RolloutSettings(chunk_frames=FRAMES, window_frames=3 * FRAMES, sink_frames=FRAMES, shot_offset=3.0, steps=STEPS)
CUTS = [[False, False, True, False, False, False], [False, True, False, False, True, False]]


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
def test_recorded_rollouts_are_plain_rollouts(mixed):
    def phase():
        return torch.autocast("cuda", torch.bfloat16, enabled=mixed, cache_enabled=torch.is_grad_enabled())

    torch.backends.cuda.matmul.allow_tf32 = False
    dit = toy_dit().float().to(DEVICE)
    recorded = Recorded(dit, DEVICE)
    script = Script(cuts_Bc=CUTS, prompt_Bc=torch.arange(BATCH * CHUNKS, device=DEVICE).reshape(BATCH, CHUNKS))
    for number, last in enumerate((2, 0, 2, 1, 2)):
        noise = toy_noise(BATCH, CHUNKS, seed=20 + number).flatten(1, 2).float().to(DEVICE)
        found = []
        for record in (False, True):
            text = dit.text([prompt.float().to(DEVICE) for prompt in toy_prompts(BATCH * CHUNKS)])
            stepper = Stepping(dit, text, recorded) if record else None
            x = StudentRollout(dit, SETTINGS, phase=phase).run(noise, script, text, Exits(steps=(last,) * CHUNKS), stepper=stepper).x_BFCHW
            found.append((x.detach(), torch.autograd.grad(x.square().mean(), dit.blocks[0].self_attn.q.weight)[0]))
        (x, slope), (again, slope_again) = found
        bar = 0.05 if mixed else 1e-4
        assert (again - x).norm() <= bar * x.norm() and (slope_again - slope).norm() <= bar * slope.norm()
    assert any(forward.graph is not None for forward in recorded.forwards.forwards.values())
