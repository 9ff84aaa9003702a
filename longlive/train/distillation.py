"""The distillation trainer: a student that makes films in a few steps, a critic that follows what it makes, a teacher that says what it should make.

At every step the critic learns flow matching on a fresh rollout of the student; every `training.dfake_gen_update_ratio` steps the student learns first,
from the difference between critic and teacher on a rollout of its own. What is drawn for a rollout as a whole (length, exit steps) is drawn from the run's
seed and the step, alike on all ranks; the rest belongs to a rank's own films.

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..config.root import Config
from ..core.errors import ConfigError
from ..core.log import logger
from ..diffusion.flow import add_noise, x0_from_velocity
from ..diffusion.known import KnownFrames
from ..diffusion.samplers import unipc
from ..engine.pipeline import rollout_settings
from ..models.spec import model_spec
from ..models.wan_dit import TextContext, WanDiT
from ..parallel.apply import Plan, apply
from ..parallel.fsdp import is_sharded
from ..parallel.mesh import Mesh, check_heads
from .cast import CRITIC, STUDENT, AdapterView, Cast, Merged, Stepper, Voice, make_cast, origin, read_network
from .clips import Words
from .compiled import RotatedAhead, checkpoint_blocks, compile_blocks
from .distillation_memory import distillation_memory
from .dmd import dmd_gradient, dmd_loss, draw_timesteps, guided, off_policy_levels, score_timesteps, velocity_loss
from .evaluate import Evaluator
from .export import save_generator
from .films import Films, FilmSource, film_dtype, open_films
from .lora_export import save_adapters
from .low_precision import GENERATOR, is_low
from .players import Role
from .scores import score
from .simulation import Exits, Recorded, Rolled, Script, Stepping, StudentRollout
from .streaming import Stream, restored
from .teacher_forcing import Film, frame_positions
from .trainer import Draw, seed_of
from .view import training_view, visible_chunks

ROLLOUTS_ONLY = {  # what off-policy steps do not read -> value of no effect
    "algorithm.ts_schedule": False, "algorithm.ts_schedule_max": False, "algorithm.last_step_only": False, "algorithm.same_step_across_blocks": True,
    "algorithm.context_noise": 0, "training.finish_chunks": False, "infra.rollout_copy": False,
}  # fmt: skip
SHARED = -1  # in seeds of what all ranks draw alike: no stream has this number


@dataclass(frozen=True)
class Step:
    """One micro-step of one player: whose turn it is, its films, and what all ranks share of it. `stream`: the films go on from it."""

    draw: Draw
    films: Films
    chunks: int
    exits: Exits
    stream: Stream | None = None


@dataclass(frozen=True)
class Noised:
    """The student's film `x_BFCHW`, the film as history reads it, the noised film. `sigma_BF`: what networks are told; `mask_BF`: 1 where a frame counts."""

    x_BFCHW: torch.Tensor
    read_BFCHW: torch.Tensor
    noisy_BFCHW: torch.Tensor
    noise_BFCHW: torch.Tensor
    sigma_BF: torch.Tensor
    mask_BF: torch.Tensor

    def last(self, frames: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The last `frames` latent frames of `tensors`: those that the student has just made."""
        return tuple(tensor[:, self.x_BFCHW.shape[1] - frames :] for tensor in tensors)


class DistillationTask:
    """Satisfies `trainer.Task` with two players. Data are opened before weights are read. `logdir` gets films, where they are asked for.

    `films` and `networks`: other sources of what is filmed and of networks (a benchmark's) than the configuration names.
    """

    name = "score_distillation"

    def __init__(
        self,
        config: Config,
        device: torch.device,
        mesh: Mesh,
        logdir: Path | None = None,
        *,
        films: FilmSource | None = None,
        networks: Callable[..., WanDiT] = read_network,
    ):
        self.config, self.device, self.mesh = config, device, mesh
        self.spec, self.mixed = model_spec(config.model_kwargs.model_name), config.infra.mixed_precision and device.type == "cuda"
        self.rollout, self.view = rollout_settings(config), training_view(config)
        self.schedule = unipc(self.rollout.steps, self.rollout.shift)
        self.films: FilmSource = open_films(config, self.spec, device, mesh) if films is None else films
        self.origin = origin(config, self.spec) if networks is read_network else {}
        self.cast: Cast = make_cast(config, self.spec, device, film_dtype(config, device), networks)
        self.module: nn.Module = self.cast.student.dit
        self.films.load(self.module.dims)
        copied = config.infra.rollout_copy and not is_low(self.module) and config.algorithm.backward_simulation  # in low precision films are made as it learns
        self.stepper = Stepper(self.cast.student, film_dtype(config, device)) if copied else None
        for wanted, reason in self._without_effect(copied):
            logger.warning("%s: %s", wanted, reason)
        recorded = copied and config.inference.cuda_graphs and mesh.sp_size == 1
        self.recorded = Recorded(self.stepper.dit, device) if recorded else None
        doubled, copy = self.cast.critic.mask == "teacher_forced", self.stepper.dit if self.stepper is not None else None
        self.memory = distillation_memory(config, self.cast.networks, copy, doubled=doubled, world=mesh.size, mixed=self.mixed)
        for network in self.cast.networks:
            check_heads(network.dims.heads, mesh.sp_size)
            self._ready(network)
        if copied and is_sharded(self.module):
            split = f"infra.rollout_copy(true) copies whole weights, and infra.sharding_strategy({config.infra.sharding_strategy}) has split them"
            raise ConfigError(f"{split}; set rollout_copy: false, or sharding_strategy: no_shard")
        self.evaluator = self._evaluator(logdir) if logdir is not None and config.evaluation.interval > 0 else None
        self.roles = self._roles()
        self._kept: dict[tuple[int, int], tuple[Step, Rolled]] = {}  # by (step, micro-step): rollouts of the student that its critic will learn on
        self.stream: Stream | None = None
        self._empty: Words | None = None

    def _without_effect(self, copied: bool) -> Iterator[tuple[str, str]]:
        """Settings that this run cannot follow, and why."""
        t, a = self.config.training, self.config.algorithm
        if a.backward_simulation:
            if self.config.infra.rollout_copy and not copied:
                yield "infra.rollout_copy is ignored", "a student in low precision makes its films as it learns"
            for key in ("ts_schedule", "ts_schedule_max"):
                if getattr(a, key) and not (a.same_step_across_blocks or a.last_step_only):
                    yield f"algorithm.{key} is ignored", "where chunks of a film leave at different steps (same_step_across_blocks: false)"
        else:
            sections = self.config.model_dump()
            for name, plain in ROLLOUTS_ONLY.items():
                section, key = name.split(".")
                if sections[section][key] != plain:
                    yield f"{name} is ignored", "off-policy there are no rollouts"
        if self.config.merge_lora:
            yield "merge_lora is ignored", "a LoRA that learns stays beside the weights"
        if t.compile and self.cast.critic.adapter is not None:
            yield "training.compile is ignored", "only a critic of its own is compiled (adapter.apply_to_critic: false)"
        if t.max_grad_norm != type(t)().max_grad_norm:
            yield "training.max_grad_norm is ignored", "the players have max_grad_norm_generator and max_grad_norm_critic"

    def _ready(self, network: WanDiT) -> None:
        infra = self.config.infra
        trains = any(p.requires_grad for p in network.parameters())
        if self._compiled(network):
            logger.info("compiling the critic's blocks")
        plan = Plan(
            blocks=self.spec.block_patterns,
            entries=self.spec.entry_patterns,
            strategy=infra.sharding_strategy,
            wrap=infra.generator_fsdp_wrap_strategy,
            bf16=self.mixed,
            recompute=partial(checkpoint_blocks, keep=infra.keep_blocks) if infra.gradient_checkpointing and trains else None,
            compile=compile_blocks if self._compiled(network) else None,
        )
        apply(network.eval(), self.device, plan)

    def _compiled(self, network: WanDiT) -> bool:
        """A critic of its own, which sees whole films: its shapes stay, and no LoRA comes and goes."""
        return self.config.training.compile and network is self.cast.critic.dit and self.cast.critic.adapter is None

    def _evaluator(self, logdir: Path) -> Evaluator:
        """The student's films need no guidance: its teacher's is in it."""
        config = self.config if self.config.inference.guidance_scale == 1 else self.config.with_overrides(["inference.guidance_scale=1.0"])
        evaluator = Evaluator(config, logdir, self.device, self.mesh)
        evaluator.check()
        return evaluator

    def _roles(self) -> tuple[Role, Role]:
        t = self.config.training
        return (
            self._role(self.cast.student, STUDENT, t.lr, (t.beta1, t.beta2), t.max_grad_norm_generator, t.ema_weight, t.dfake_gen_update_ratio),
            self._role(self.cast.critic, CRITIC, t.lr_critic, (t.beta1_critic, t.beta2_critic), t.max_grad_norm_critic, 0.0, 1),
        )

    def _role(self, voice: Voice, name: str, lr: float, betas: tuple[float, float], clip: float, ema: float, every: int) -> Role:
        trained = voice.dit if voice.adapter is None else AdapterView(voice.dit, voice.adapter)
        name, prefix = name + ("_lora" if voice.adapter else ""), "" if name == STUDENT else f"{name}_"
        rates = {"lr": lr, "betas": betas, "max_grad_norm": clip, "ema_decay": ema}
        return Role(name=name, network=voice.dit, trained=trained, every=every, prefix=prefix, **rates)

    @property
    def clips(self) -> FilmSource:
        """What a dry run reports of the data."""
        return self.films

    # ------------------------------------------------------------ what a step is about

    def warm_up(self) -> Iterator[Step]:
        """A step of either player with the longest rollout and the latest exit."""
        self.films.prepare()
        chunks = self._chunks(self.config.training.num_training_frames)
        exits = self._exits([self.schedule.steps - 1] * chunks)
        for role in self.roles:
            generators = torch.Generator(self.device).manual_seed(0), torch.Generator().manual_seed(0)
            draw = Draw(*generators, 0.0, step=self.config.algorithm.regression_steps, player=role.name)
            yield Step(draw, self.films.example(0, chunks), chunks, exits)

    def batch(self, draw: Draw) -> Step:
        for low in self.cast.low:
            low.begin(draw)
        number = [role.name for role in self.roles].index(draw.player)
        if number and (draw.step, draw.micro) in self._kept:
            return replace(self._kept[draw.step, draw.micro][0], draw=draw)
        shared = torch.Generator().manual_seed(seed_of(self.config.logging.seed, SHARED, draw.step, draw.micro, number))
        a, t, steps = self.config.algorithm, self.config.training, self.schedule.steps
        low, high = self._chunks(t.min_num_training_frames), self._chunks(t.num_training_frames)
        chunks = int(torch.randint(low, high + 1, (1,), generator=shared))
        films, stream = self._films(draw, chunks)
        chunks = chunks if stream is None else min(chunks, stream.chunks - stream.made)
        drawn = torch.randint(steps, (chunks,), generator=shared).tolist()
        if a.last_step_only:
            drawn = [steps - 1] * chunks
        elif a.same_step_across_blocks:
            drawn = drawn[:1] * chunks
        return Step(draw, films, chunks, self._exits(drawn), stream)

    def _films(self, draw: Draw, chunks: int) -> tuple[Films, Stream | None]:
        """The films of this step: new ones, or in long tuning those that are not finished."""
        if not self.config.training.streaming_frames:
            return self.films.draw(draw, chunks), None
        if self.stream is None or self.stream.made == self.stream.chunks:
            films = self.films.draw(draw, self._chunks(self.config.training.streaming_frames))
            self.stream = Stream(films, self._rollout())
        return self.stream.films, self.stream

    def _rollout(self) -> StudentRollout:
        return StudentRollout(self.cast.student.dit, self.rollout, phase=lambda: self._phase(cached=torch.is_grad_enabled()), mesh=self.mesh)

    def _chunks(self, frames: int) -> int:
        return frames // self.config.chunk_frames

    def _exits(self, steps: list[int]) -> Exits:
        learn = self._chunks(self.config.training.slice_last_frames)
        return Exits(steps=tuple(steps), first_with_gradients=max(0, len(steps) - learn), finish=self.config.training.finish_chunks)

    # ------------------------------------------------------------ losses

    def loss(self, step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of the player whose turn it is; its LoRA is the one that takes part when this returns."""
        learn = self._student_loss if step.draw.player == self.roles[0].name else self._critic_loss
        return learn(step)

    def _student_loss(self, step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with self._phase(cached=True):
            rolled = self._rolled(step)
        x = rolled.x_BFCHW
        if self.config.training.critic_reuses_rollout:
            self._kept = {at: kept for at, kept in self._kept.items() if at[0] == step.draw.step}
            self._kept[step.draw.step, step.draw.micro] = (step, Rolled(x.detach(), rolled.read_BFCHW))
        if step.draw.step < self.config.algorithm.regression_steps:
            return self._answer_loss(step, rolled)
        film, noised = self._shown(step, rolled)
        with torch.no_grad(), self._phase():
            fake = self._clean(self.cast.critic, step, film, noised, self.config.algorithm.fake_guidance_scale)
            real = self._clean(self.cast.teacher, step, film, noised, self.config.algorithm.real_guidance_scale)
        made, real, fake, mask_BF = noised.last(x.shape[1], noised.x_BFCHW, real, fake, noised.mask_BF)
        gradient = dmd_gradient(made, real, fake, mask_BF, self.config.chunk_frames)
        self.cast.student.speak()
        return dmd_loss(x, gradient, mask_BF), {"dmdtrain_gradient_norm": gradient.abs().mean(), "distance": (made - real).abs().mean()}

    def _answer_loss(self, step: Step, rolled: Rolled) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`algorithm.regression_steps`: the student's velocity at its exits against that of the guided teacher, of the same noisy chunks and history."""
        x, asked, known_BF = rolled.x_BFCHW, rolled.asked_BFCHW, self._known_BF(step)
        told_BF, level_BF = self._at_exits(step, self.schedule.model_sigma, known_BF), self._at_exits(step, self.schedule.sigmas.__getitem__, known_BF)
        mask = known_BF.logical_not().float()
        mask[:, : step.exits.first_with_gradients * self.config.chunk_frames] = 0
        shown = Noised(x.detach(), rolled.read_BFCHW, asked, asked, told_BF.masked_fill(known_BF, 0.0), mask)
        with torch.no_grad(), self._phase():
            real = self._clean(self.cast.teacher, step, self._film(step), shown, self.config.algorithm.real_guidance_scale)
        self.cast.student.speak()
        mine, wanted = ((asked - clean) / level[..., None, None, None] for clean, level in ((x, level_BF), (real, told_BF)))
        return velocity_loss(mine, wanted, mask), {"distance": (x.detach() - real).abs().mean()}

    def _at_exits(self, step: Step, level: Callable[[int], float], known_BF: torch.Tensor) -> torch.Tensor:
        """[B, F], float64: `level` of the step at which a frame's chunk leaves."""
        levels = torch.tensor([level(exit) for exit in step.exits.steps], dtype=torch.float64)
        return levels.repeat_interleave(self.config.chunk_frames).to(known_BF.device, non_blocking=True).expand_as(known_BF)

    def _critic_loss(self, step: Step) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        kept = self._kept.pop((step.draw.step, step.draw.micro), None)
        if kept is not None:
            step, rolled = replace(kept[0], draw=step.draw), kept[1]
        else:
            with torch.no_grad(), self._phase():
                rolled = self._rolled(step)
        film, noised = self._shown(step, rolled)
        with self._phase(cached=True):
            dit = self.cast.critic.speak()
            velocity = self._score(self.cast.critic, dit, step.films.words, film, (noised.noisy_BFCHW, noised.sigma_BF, noised.read_BFCHW))
        return velocity_loss(velocity, noised.noise_BFCHW - noised.x_BFCHW, noised.mask_BF), {}

    def _phase(self, cached: bool = False) -> AbstractContextManager:
        """Precision of forwards. Casts of weights may only be kept where all forwards inside have gradients, or have none of the weights that learn."""
        if not self.mixed:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cached)

    def _text(self, dit: WanDiT, words: Words) -> TextContext:
        return dit.text_context(words.raw_RMt.to(dit.patch_embedding.weight.dtype), words.bias_RM)

    def _rolled(self, step: Step) -> Rolled:
        """The student's film."""
        films, draw = step.films, step.draw
        batch, shape = len(films.cuts), self.config.data.image_or_video_shape
        noise = torch.randn((batch, step.chunks * self.config.chunk_frames, *shape[2:]), generator=draw.generator, device=self.device)
        dit = self.cast.student.speak()
        free = None
        if self.stepper is not None:
            copy = self.stepper.current()
            with torch.no_grad():
                free = Stepping(copy, self._text(copy, films.words), self.recorded if step.stream is None else None)
        known = None if films.first_B1CHW is None else KnownFrames(films.first_B1CHW)
        if not self.config.algorithm.backward_simulation:
            return Rolled(self._off_policy(step, dit, noise), films.latents_BFCHW)
        given = {"known": known, "stepper": free, **self._commit_noise(draw.generator)}
        if step.stream is not None:
            return step.stream.go_on(noise, self._text(dit, films.words), step.exits, **given)
        return self._rollout().run(noise, self._script(step), self._text(dit, films.words), step.exits, **given)

    def _commit_noise(self, generator: torch.Generator) -> dict:
        """How a rollout puts noise on what it commits (`algorithm.context_noise`, a timestep); nothing by default, as generation."""
        level = self.config.algorithm.context_noise / 1000
        if level == 0:
            return {}

        def noised(number: int, clean: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(clean.shape, generator=generator, device=clean.device)
            return add_noise(clean, noise, torch.full((), level, device=clean.device))

        return {"before_commit": noised, "commit_level": level}

    def _off_policy(self, step: Step, dit: WanDiT, noise: torch.Tensor) -> torch.Tensor:
        """Films of the data, noised to a level of the step list, cleaned in one forward. The list ends above 0: at 0 there is nothing to learn (D23)."""
        films, f = step.films, self.config.chunk_frames
        levels = torch.tensor(self._levels(), dtype=torch.float64, device=self.device)
        drawn_Bc = torch.randint(len(levels), (len(films.cuts), step.chunks), generator=step.draw.generator, device=self.device)
        known = self._known_BF(step)
        sigma_BF = levels[drawn_Bc].repeat_interleave(f, 1).masked_fill(known, 0.0)
        clean = films.latents_BFCHW
        noisy = add_noise(clean, noise, sigma_BF.float())
        velocity = score(dit, self._text(dit, films.words), self._film(step), self.cast.student.mask, noisy, sigma_BF, clean, mesh=self.mesh)
        return torch.where(known[..., None, None, None], clean, x0_from_velocity(noisy, velocity, sigma_BF))

    def _levels(self) -> list[float]:
        a = self.config.algorithm
        return off_policy_levels(a.denoising_step_list, self.rollout.steps, self.rollout.shift, warp=a.warp_denoising_step)

    # ------------------------------------------------------------ scores

    def _script(self, step: Step) -> Script:
        rows = torch.arange(len(step.films.cuts) * step.chunks, device=self.device).reshape(-1, step.chunks)
        return Script(cuts_Bc=step.films.cuts, prompt_Bc=rows)

    def _shown(self, step: Step, rolled: Rolled) -> tuple[Film, Noised]:
        """What scores see of a rollout, and its noised form; in long tuning behind the chunks that were visible when it began."""
        x = rolled.x_BFCHW.detach()
        if step.stream is None:
            return self._film(step), self._noised(step, x, rolled.read_BFCHW)
        t = self.config.training
        film, clip = step.stream.shown(self.view, window=t.visibility == "window", offset=self.rollout.shot_offset if t.shot_offset else 0.0)
        x = torch.cat((clip[:, : clip.shape[1] - x.shape[1]], x), dim=1)
        return film, self._noised(step, x, clip, carried=step.stream.segment[0])

    def _film(self, step: Step) -> Film:
        """How scores see the film: as training does (`training.visibility`, `training.shot_offset`)."""
        t, cuts = self.config.training, step.films.cuts
        position = frame_positions(cuts, self.config.chunk_frames, self.rollout.shot_offset if t.shot_offset else 0.0)
        visible, committed = visible_chunks(self.config, self.view, cuts)
        prompt = self._script(step).prompt_Bc
        return Film(prompt, position.to(self.device, non_blocking=True), visible, committed, self.view.t_scale, self.view.relative)

    def _known_BF(self, step: Step, frames: int | None = None) -> torch.Tensor:
        """Where a frame of the film is given. In long tuning the film's first chunk, where it is shown at all, is the first of those that are."""
        frames = step.chunks * self.config.chunk_frames if frames is None else frames
        known = torch.zeros(len(step.films.cuts), frames, dtype=torch.bool, device=self.device)
        if step.films.first_B1CHW is not None:
            begins = [True] * len(known) if step.stream is None else [seen[0] == 0 for seen in step.stream.seen_Bm]
            known[:, 0] = torch.tensor(begins).to(self.device, non_blocking=True)
        return known

    def _noised(self, step: Step, x: torch.Tensor, read: torch.Tensor, carried: int = 0) -> Noised:
        """The film `x`, which history reads as `read`, at drawn levels.

        Given frames stay clean, at level 0, and do not count; nor do chunks that give the student no gradient.
        `carried`: so many chunks at the beginning are of earlier steps; they do not count either.
        """
        a, f = self.config.algorithm, self.config.chunk_frames
        student = step.draw.player == self.roles[0].name
        scheduled = a.backward_simulation and (a.ts_schedule or a.ts_schedule_max)  # films of the data leave at no step
        bounds = step.exits.bounds(self.schedule, self.rollout.shift) if scheduled else None
        low = bounds[1] if a.ts_schedule and bounds else a.min_score_timestep
        high = bounds[0] if a.ts_schedule_max and bounds else 1000
        voices = (self.cast.teacher, self.cast.critic) if student else (self.cast.critic,)
        apart = step.films.first_B1CHW is not None or all(voice.mask == "teacher_forced" for voice in voices)
        raw = draw_timesteps(len(x), x.shape[1] // f, step.draw.generator, low=low, high=high, per_chunk=apart)
        known = self._known_BF(step, x.shape[1])
        sigma_BF = (score_timesteps(raw, self.rollout.shift) / 1000).repeat_interleave(f, 1).masked_fill(known, 0.0)
        noise = torch.randn(x.shape, generator=step.draw.generator, device=self.device)
        noisy = add_noise(x, noise, sigma_BF.to(x.dtype))
        mask = known.logical_not().float()
        mask[:, : (carried + step.exits.first_with_gradients * student) * f] = 0
        return Noised(x, read, noisy, noise, sigma_BF, mask)

    def _clean(self, voice: Voice, step: Step, film: Film, noised: Noised, guidance: float) -> torch.Tensor:
        """What a role thinks the clean film is; prompted and unprompted in one forward where there is guidance."""
        dit, words, batch = voice.speak(), step.films.words, len(noised.x_BFCHW)
        given = (noised.noisy_BFCHW, noised.sigma_BF, noised.read_BFCHW)
        if guidance:
            film = _twice(film, len(words.raw_RMt))
            words = Words(*(torch.cat(parts) for parts in zip(words, self._unprompted())))
            given = tuple(part.repeat(2, *[1] * (part.dim() - 1)) for part in given)
        velocity = self._score(voice, dit, words, film, given)
        clean = x0_from_velocity(given[0], velocity, given[1])
        return guided(clean[:batch], clean[batch:], guidance) if guidance else clean

    def _unprompted(self) -> Words:
        """The row of the negative prompt: encoded once."""
        if self._empty is None:
            self._empty = self.films.text.rows([self.config.inference.negative_prompt])
        return self._empty

    def _score(self, voice: Voice, dit: WanDiT, words: Words, film: Film, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """What the role says of (noisy film, its levels, the clean film)."""
        ahead = self._compiled(dit) and voice.mask != "bidirectional"
        return score(dit, self._text(dit, words), film, voice.mask, *given, **({"wrap": RotatedAhead} if ahead else {}), mesh=self.mesh)

    # ------------------------------------------------------------ what is kept and written

    def state(self) -> dict:
        going_on = self.stream is not None and 0 < self.stream.made < self.stream.chunks
        return {"films": self.films.state()} | ({"stream": self.stream.state()} if going_on else {})

    def restore(self, state: dict) -> None:
        self.films.restore(state["films"])
        self.stream = restored(state["stream"], self._rollout(), self.device) if "stream" in state else None

    def merged(self, states: Sequence[dict]) -> dict:
        """For a run that goes on on other ranks: in long tuning other films begin, since pages belong to ranks."""
        return {"films": states[0]["films"]}

    def evaluate(self, step: int, ema: dict[str, torch.Tensor]) -> dict[str, float]:
        """Films of the student in its few steps, and their scores. Every rank must call it; only for a task with a `logdir` and `evaluation.interval`."""
        student = self.cast.student
        if student.adapter is None:
            return self.evaluator.run(self.module, ema, step)
        raw = Merged(self.module, student.adapter, AdapterView(self.module, student.adapter).state_dict())
        return self.evaluator.run(self.module, Merged(self.module, student.adapter, ema) if ema else {}, step, raw=raw)

    def export(self, folder: Path, step: int, ema: dict[str, torch.Tensor]) -> None:
        """The student: its LoRA, with the critic's, or its weights."""
        metadata = {**self.origin, "trainer": self.name, "step": str(step), "seed": str(self.config.logging.seed), "steps": str(self.schedule.steps)}
        for low in self.cast.low:
            metadata |= low.metadata() if low.network == GENERATOR else {}
        if self.cast.student.adapter is None:
            save_generator(folder, dict(self.module.named_parameters()), ema, metadata)
        else:
            voices = (self.cast.student, self.cast.critic)
            save_adapters(folder, {voice.adapter: voice.dit for voice in voices if voice.adapter is not None}, ema, metadata)

    def finish(self, folder: Path) -> dict[str, float]:
        return {}


def _twice(film: Film, empty_row: int) -> Film:
    """The films, and the same films with the text row `empty_row` throughout."""

    def double(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else torch.cat((tensor, tensor))

    prompt = torch.cat((film.prompt_Bc, torch.full_like(film.prompt_Bc, empty_row)))
    return Film(prompt, double(film.position_BF), double(film.visible_BcP), double(film.committed_BcP), film.t_scale, film.relative)
