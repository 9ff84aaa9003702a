"""Truth made worse on purpose: blurred and noisy frames, to show what the judge's scores bear.

Legend: T pixel frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..core.errors import InputError
from ..world.draw import Draw
from ..world.story import WorldStory
from ..world.vocabulary import HEIGHT

MOST_BLUR, MOST_NOISE = 16.0, 128.0


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """`blur`: standard deviation of a Gaussian in pixels at 192x320. `noise`: standard deviation of white noise, in levels of 0..255."""

    blur: float = 0.0
    noise: float = 0.0

    def __post_init__(self):
        for name, value, most in (("--blur", self.blur, MOST_BLUR), ("--noise", self.noise, MOST_NOISE)):
            if not 0 <= value <= most:
                raise InputError(f"{name} {value}: use 0 to {most:g} ({'pixels at 192x320' if name == '--blur' else 'levels of 0..255'})")

    def __bool__(self) -> bool:
        return self.blur > 0 or self.noise > 0

    def __call__(self, frames_THW3: torch.Tensor, seed: int) -> torch.Tensor:
        """uint8 [T, H, W, 3] -> the same, blurred first, then noisy. The noise is a function of `seed` and the shape, on every device."""
        x = frames_THW3.permute(0, 3, 1, 2).float()
        if self.blur:
            x = gaussian_blur(x, self.blur * x.shape[2] / HEIGHT)
        if self.noise:
            random = torch.Generator().manual_seed(seed)
            x = x + self.noise * torch.randn(x.shape, generator=random).to(x.device)
        return x.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def gaussian_blur(x_TCHW: torch.Tensor, sigma: float) -> torch.Tensor:
    """A separable Gaussian of `sigma` pixels, cut off at three sigma, borders repeated."""
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=x_TCHW.device, dtype=x_TCHW.dtype)
    weights = torch.softmax(-(offsets**2) / (2 * sigma**2), 0)
    t, c, h, w = x_TCHW.shape
    flat = F.pad(x_TCHW.reshape(t * c, 1, h, w), (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(flat, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1)).view(t, c, h, w)


def degraded_chunks(stories: Sequence[WorldStory], chunks: Iterable[tuple[int, torch.Tensor]], how: Degradation) -> Iterator[tuple[int, torch.Tensor]]:
    """The same stream of (film index, uint8 frames of its next chunk), degraded. Noise belongs to (story, chunk), not to the order of films."""
    done = [0] * len(stories)
    for index, frames in chunks:
        seed = Draw("degradation", stories[index].seed, done[index]).below(1 << 62)
        done[index] += 1
        yield index, how(frames, seed)
