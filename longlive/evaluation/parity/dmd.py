"""Distillation losses and gradients, recomputed from recorded draws.

The published rollout looks levels up in the training table: a chunk's clean estimate at the entry nearest to its timestep, and the clean pass at the last
entry, which adds 0.5 % noise. The scores see one noisy copy, chunk by chunk, without shot offsets. `grad_norm_all` of the student contains what the
published cache leaks into earlier chunks: it alone is recomputed with that leak (`_Leaking`), which our training does not have.

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

import torch

from ...cache.rolled import RolledOut
from ...diffusion.flow import add_noise, train_table, x0_from_velocity
from ...diffusion.known import KnownFrames
from ...diffusion.samplers import unipc
from ...engine.rollout import RolloutSettings
from ...models.spec import DiTDims
from ...models.wan_dit import WanDiT
from ...ops.attention import attention
from ...ops.rope import apply_rope
from ...train.dmd import dmd_gradient, dmd_loss, guided, score_timesteps, velocity_loss
from ...train.scores import score
from ...train.simulation import Exits, Script, StudentRollout
from ...train.teacher_forcing import Film, frame_positions
from .entries import Entry

SHIFT, REAL_GUIDANCE = 5.0, 3.0
WITH_FIRST = "per-chunk normaliser that includes the conditioning frame"
SETTINGS = {WITH_FIRST: lambda out: out, "rollout commit at the training table's last sigma (0.00498) instead of 0": lambda out: out}


def _network(entry: Entry, role: str) -> WanDiT:
    sizes = dict(entry.config["dit"])
    dit = WanDiT(DiTDims(channels=sizes.pop("ch"), **sizes))
    dit.load_state_dict(entry.weights[role])
    return dit


class _Leaking:
    """What the published cache does where gradients are on: values are those of the clean pass, gradients go to the keys and values of the exit step."""

    def __init__(self, attend: RolledOut, written: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]):
        self.attend, self.written = attend, written

    def __call__(self, q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor | None:
        a = self.attend
        if not torch.is_grad_enabled():
            return a(q, k, v, layer)
        k = apply_rope(k, *a.rope)
        self.written[layer, a.own] = (k - k.detach(), v - v.detach())
        if a.most:
            leaks = [self.written[layer, slot] for slot in a.visible_BP[0]]
            past_k, past_v = (past + torch.cat(parts, dim=1) for past, parts in zip(a.past(layer), zip(*leaks)))
            k, v = torch.cat((past_k, k), dim=1), torch.cat((past_v, v), dim=1)
        return attention(apply_rope(q, *a.rope), k, v)


class _Recording:
    """One recorded step: the student's film, its noised form, and what teacher and critic say of it."""

    def __init__(self, entry: Entry):
        self.config, self.given = entry.config, entry.inputs
        self.table, self.f = train_table(self.config.get("timestep_shift") or SHIFT), self.config["frames_per_chunk"]
        self.student, self.teacher, self.critic = (_network(entry, role) for role in ("student", "teacher", "critic"))
        self.chunks = int(self.given["num_blocks"][0])
        noise = self.given["gen_noise"][:, : self.chunks * self.f]
        self.batch, self.frames = noise.shape[:2]
        steps = [int(s) for s in self.given["exit_flags"][: self.chunks]]
        same = self.config.get("same_step_across_blocks", True)
        self.exits = Exits(steps=tuple([steps[0]] * self.chunks if same else steps), levels=self._levels())
        self.settings = RolloutSettings(
            chunk_frames=self.f,
            window_frames=self.config["local_attn_frames"],
            sink_frames=self.config["sink_frames"],
            multi_shot=bool(self.config.get("multi_shot_sink", False)),
            shot_offset=self.config["multi_shot_rope_offset"],
            steps=self.config["sampling_steps"],
            shift=self.config.get("timestep_shift") or SHIFT,
        )
        self.mask_BF = torch.ones(self.batch, self.frames)
        if self.config["i2v"]:
            self.mask_BF[:, 0] = 0

    def _levels(self) -> tuple[float, ...]:
        timesteps = unipc(self.config["sampling_steps"], self.config.get("timestep_shift") or SHIFT).timesteps
        return tuple(self.table.sigmas[self.table.nearest(torch.tensor([float(t) for t in timesteps]))].tolist())

    def film(self, leaking: bool = False) -> torch.Tensor:
        """The student's rollout."""
        written = {}
        cuts = [bool(c) for c in self.config["scene_cut_mask"][: self.chunks]]
        prompt = torch.arange(self.chunks).expand(self.batch, -1)
        text = self.student.text(list(self.given["context"][: self.chunks]))
        known = KnownFrames(self.given["initial_latent"]) if self.config["i2v"] else None
        wrap = {"wrap": lambda attend: _Leaking(attend, written)} if leaking else {}
        rollout = StudentRollout(self.student, self.settings, **wrap)
        script = Script(cuts_Bc=[cuts] * self.batch, prompt_Bc=prompt)
        noise = self.given["gen_noise"][:, : self.frames]
        return rollout.run(noise, script, text, self.exits, known=known, before_commit=self._noised).x_BFCHW

    def _noised(self, chunk: int, clean: torch.Tensor) -> torch.Tensor:
        noise = self.given.get(f"context_noise.{chunk}")
        if noise is None:
            return clean
        return add_noise(clean, noise.reshape(clean.shape), self.table.sigmas[-1])

    def timesteps(self) -> torch.Tensor:
        """[B, F], shifted and clamped; 0 on a given frame."""
        raw = self.given["timestep_raw.0"]
        per_frame = raw.expand(self.batch, self.frames) if raw.shape[1] == 1 else raw[:, : self.frames : self.f].repeat_interleave(self.f, 1)
        return score_timesteps(per_frame.float(), self.settings.shift) * self.mask_BF  # in float32, as recorded

    def noisy(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        mixed = add_noise(x, self.given["score_noise"][:, : self.frames], self._sigma(timestep))
        return torch.where(self.mask_BF[..., None, None, None] > 0, mixed, x)

    def _sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.table.sigmas[self.table.nearest(timestep.float())]

    def velocity(self, dit: WanDiT, noisy: torch.Tensor, timestep: torch.Tensor, embeds: list[torch.Tensor]) -> torch.Tensor:
        prompt = (torch.arange(self.chunks) % len(embeds)).expand(self.batch, -1)
        film = Film(prompt, frame_positions([[False] * self.chunks] * self.batch, self.f, 0.0))
        return score(dit, dit.text(embeds), film, "causal", noisy, timestep.double() / 1000, noisy)

    def clean(self, dit: WanDiT, noisy: torch.Tensor, timestep: torch.Tensor, embeds: list[torch.Tensor]) -> torch.Tensor:
        return x0_from_velocity(noisy, self.velocity(dit, noisy, timestep, embeds), self._sigma(timestep))


def run(entry: Entry) -> dict[str, torch.Tensor]:
    """The recorded outputs of one `dmd` entry, those in `entry.wanted`."""
    step = _Recording(entry)
    critic = entry.config["kind"] == "critic"
    prompts, empty = list(step.given["context"][: step.chunks]), list(step.given["uncond"])
    timestep = step.timesteps()
    with torch.set_grad_enabled(not critic):
        x = step.film()
    out = {"rollout": x.detach(), "pred_image": x.detach(), "score_timestep": timestep.float()}
    out["denoised_from_to"] = torch.tensor(step.exits.bounds(unipc(step.settings.steps, step.settings.shift), step.settings.shift) or (0, 0))
    noisy = step.noisy(x.detach(), timestep)
    if critic:
        target = step.given["score_noise"][:, : step.frames] - x
        loss = velocity_loss(step.velocity(step.critic, noisy, timestep, prompts), target, step.mask_BF)
        learner = step.critic
    else:
        with torch.no_grad():
            fake = step.clean(step.critic, noisy, timestep, prompts)
            real = guided(step.clean(step.teacher, noisy, timestep, prompts), step.clean(step.teacher, noisy, timestep, empty), REAL_GUIDANCE)
            recorded = dmd_gradient(x, real, fake, torch.ones_like(step.mask_BF), step.f, epsilon=0.0)
            gradient = recorded if entry.setting == WITH_FIRST else dmd_gradient(x, real, fake, step.mask_BF, step.f, epsilon=0.0)
        loss = dmd_loss(x, gradient, step.mask_BF)
        learner = step.student
        out |= {"score_input": noisy, "kl_grad": gradient.float()}
    gradients = dict(zip((name for name, _ in learner.named_parameters()), torch.autograd.grad(loss, list(learner.parameters()), allow_unused=True)))
    out |= {"loss": loss.detach().reshape(1), "gradient_mask": step.mask_BF.to(torch.uint8)}
    out |= {f"grad.{name}": g for name, g in gradients.items() if g is not None}
    if "grad_norm_all" in entry.wanted:
        if not critic:
            loss = dmd_loss(step.film(leaking=True), recorded, step.mask_BF)
        leaked = torch.autograd.grad(loss, list(learner.parameters()), allow_unused=True) if not critic else gradients.values()
        out["grad_norm_all"] = torch.nn.utils.get_total_norm([g for g in leaked if g is not None]).reshape(1)
    return {name: out[name] for name in entry.wanted}
