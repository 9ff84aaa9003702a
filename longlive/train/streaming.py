"""Streaming long tuning: rollouts that go on from step to step, so that the student learns on films far longer than a step could hold.

Every step makes the next segment of the same films, with the pages that are still seen; after `training.streaming_frames` other films begin. Scores see
the new segment behind the chunks that were visible when it began, at their true positions: what these saw in their turn is gone, as it is
in generation. Only the segment counts in losses. (Spec training §6.7.)

Legend: B batch, F latent frames, c chunks of a film, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..cache.attend import visible_tensor
from ..engine.rollout import RolloutSettings
from .clips import Words
from .films import Films
from .simulation import Exits, Rolled, Script, StudentRollout
from .teacher_forcing import Film, frame_positions


class Stream:
    """One batch of films in the making. `seen_Bm`: per sample, the chunks that scores are shown: those visible when the last segment began, and its own."""

    def __init__(self, films: Films, rollout: StudentRollout):
        self.films, self.rollout = films, rollout
        self.chunks = len(films.cuts[0])
        self.latents_BFCHW: torch.Tensor | None = None
        self.seen_Bm: list[list[int]] = []
        self.segment = (0, 0)

    @property
    def made(self) -> int:
        """Chunks that are finished."""
        return 0 if self.rollout.standing is None else self.rollout.standing.chunk

    def go_on(self, noise_BFCHW: torch.Tensor, text, exits: Exits, **options) -> Rolled:
        """The next segment, as `StudentRollout.run` gives it."""
        before, first, count = self.rollout.standing, self.made, len(exits.steps)
        rows = self._rows(noise_BFCHW.device)[:, first : first + count]
        script = Script(cuts_Bc=[film[first : first + count] for film in self.films.cuts], prompt_Bc=rows)
        rolled = self.rollout.run(noise_BFCHW, script, text, exits, more=first + count < self.chunks, **options)
        carried = [[]] * len(self.films.cuts) if before is None else [list(window.order) for window in before.windows]
        self.seen_Bm = [[*chunks, *range(first, first + count)] for chunks in carried]
        self.segment = (len(carried[0]), count)
        fresh = rolled.read_BFCHW
        self.latents_BFCHW = fresh if self.latents_BFCHW is None else torch.cat((self.latents_BFCHW, fresh), dim=1)
        return rolled

    def _rows(self, device: torch.device) -> torch.Tensor:
        return torch.arange(len(self.films.cuts) * self.chunks, device=device).reshape(-1, self.chunks)

    def shown(self, settings: RolloutSettings, *, window: bool, offset: float) -> tuple[Film, torch.Tensor]:
        """Layout and clean latents of what scores see of the last segment, by the `settings` of `view.training_view`.

        `window`: as generation sees it; `offset`: of every cut, in positions.
        """
        x = self.latents_BFCHW
        f, chosen = settings.chunk_frames, torch.tensor(self.seen_Bm)
        frames = (chosen[..., None] * f + torch.arange(f)).flatten(1)
        position = frame_positions(self.films.cuts, f, offset).gather(1, frames)
        visible = None
        if window:
            every = visible_tensor(self.films.cuts, settings.policy)
            rows = [[[own.index(c) for c in every[b, chunk].tolist() if c in own[:i]] for i, chunk in enumerate(own)] for b, own in enumerate(self.seen_Bm)]
            width = every.shape[2]
            visible = torch.tensor([[row + [-1] * (width - len(row)) for row in sample] for sample in rows])
        chosen, frames, position = (t.to(x.device, non_blocking=True) for t in (chosen, frames, position))
        prompt = self._rows(x.device).gather(1, chosen)
        batch = torch.arange(len(chosen), device=x.device)[:, None]
        clip = x[batch, frames]
        return Film(prompt, position, visible, None, settings.t_scale, settings.relative), clip

    def state(self) -> dict[str, Any]:
        """Everything that the next segment depends on beside the weights."""
        films, words = self.films, self.films.words
        tensors = {"raw": words.raw_RMt, "bias": words.bias_RM, "latents": self.latents_BFCHW}
        tensors |= {} if films.first_B1CHW is None else {"first": films.first_B1CHW}
        return {"tensors": tensors, "cuts": [list(film) for film in films.cuts], "rollout": self.rollout.state()}


def restored(state: Mapping[str, Any], rollout: StudentRollout, device: torch.device) -> Stream:
    """The stream that `state` was taken of, going on with `rollout`."""
    tensors = {name: tensor.to(device) for name, tensor in state["tensors"].items()}
    cuts = tuple(tuple(bool(cut) for cut in film) for film in state["cuts"])
    stream = Stream(Films(cuts=cuts, words=Words(tensors["raw"], tensors["bias"]), first_B1CHW=tensors.get("first")), rollout)
    stream.latents_BFCHW = tensors["latents"]
    rollout.restore(state["rollout"], device)
    return stream
