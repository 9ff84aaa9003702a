"""UniPC as arithmetic on coefficients, decided before the first step.

UniPC (order 2, bh2, x0 prediction) is linear in the starting noise and the velocities that the model returned. So its whole run is a
triangle of numbers: after step i the sample is `noise + sum_j rows[i][j] velocity_j`. They are derived here once, in float64, for any
number of steps; sampling is then sums of float32 latents, without solver state, host syncs or small linear systems. (Spec inference §3.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..core.errors import InputError

MAX_LEVEL = float(np.float32(0.999))


@dataclass(frozen=True)
class Schedule:
    """A sampler's run of S steps.

    timesteps  S integers, what the model is told (1000 sigma, cut off)
    sigmas     S + 1 floats (float32 values), what the solver computes with; the last is 0
    rows       S rows of 1 .. S coefficients: the sample after step i from the velocities 0 .. i
    """

    timesteps: tuple[int, ...]
    sigmas: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def model_sigma(self, step: int) -> float:
        """The noise level that the model is told at `step`: the integer timestep / 1000."""
        return self.timesteps[step] / 1000


@functools.lru_cache(maxsize=64)
def unipc(steps: int, shift: float) -> Schedule:
    """UniPC's schedule (spec inference §3.2-3.4). 4 steps at shift 5: timesteps 999, 937, 833, 624."""
    if steps < 1:
        raise InputError(f"sampling_steps({steps}) must be at least 1")
    if shift <= 0:
        raise InputError(f"timestep_shift({shift}) must be greater than 0")
    level = np.linspace(MAX_LEVEL, 0, steps + 1)[:-1]
    sigma = shift * level / (1 + (shift - 1) * level)
    timesteps = tuple(int(t) for t in sigma * 1000)
    sigmas = tuple(float(s) for s in np.append(sigma, 0).astype(np.float32))
    if sigmas[0] >= 1:
        raise InputError(f"timestep_shift({shift}) puts the first noise level at 1 in float32, where the solver divides by zero; use a smaller one")
    return Schedule(timesteps, sigmas, _rows(sigmas))


def _rows(sigmas: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """Runs the solver on coefficient vectors over (noise, velocity 0, ..., velocity S - 1) instead of on samples."""
    steps = len(sigmas) - 1
    unit = np.eye(steps + 1)
    sample, base, clean, rows = unit[0], unit[0], [], []
    for i in range(steps):
        clean.append(sample - sigmas[i] * unit[i + 1])
        if i:
            base = _move(base, clean[i - 1], sigmas[i - 1], sigmas[i], _corrector_pull(sigmas, clean, i))
        else:
            base = sample
        order = 1 if i in (0, steps - 1) else 2
        sample = _move(base, clean[i], sigmas[i], sigmas[i + 1], _predictor_pull(sigmas, clean, i) if order == 2 else 0.0)
        rows.append(tuple(float(c) for c in sample[1 : i + 2]))
    return tuple(rows)


def _log_snr(sigma: float) -> float:
    return float(np.log((1 - sigma) / sigma))


def _move(x: np.ndarray, clean: np.ndarray, sigma: float, target: float, pull: np.ndarray | float) -> np.ndarray:
    """From level `sigma` to `target`: (target / sigma) x - (1 - target) expm1(-h) (clean + pull), h the step in log-SNR."""
    if target == 0:
        return clean + pull
    growth = np.expm1(-(_log_snr(target) - _log_snr(sigma)))
    return target / sigma * x - (1 - target) * growth * (clean + pull)


def _slope(sigmas: tuple[float, ...], clean: list[np.ndarray], i: int) -> tuple[np.ndarray, float]:
    """((clean_{i-1} - clean_i) / r, r), r the previous step over the coming one in log-SNR (negative)."""
    here = _log_snr(sigmas[i])
    r = (_log_snr(sigmas[i - 1]) - here) / (_log_snr(sigmas[i + 1]) - here)
    return (clean[i - 1] - clean[i]) / r, r


def _predictor_pull(sigmas: tuple[float, ...], clean: list[np.ndarray], i: int) -> np.ndarray:
    return 0.5 * _slope(sigmas, clean, i)[0]


def _corrector_pull(sigmas: tuple[float, ...], clean: list[np.ndarray], i: int) -> np.ndarray:
    """What the velocity at step `i` teaches about the move from i - 1 to i; of order 1 for the first move, else 2."""
    news = clean[i] - clean[i - 1]
    if i == 1:
        return 0.5 * news
    slope, r = _slope(sigmas, clean, i - 1)
    hh = _log_snr(sigmas[i - 1]) - _log_snr(sigmas[i])
    growth = np.expm1(hh)
    g1 = growth / hh - 1
    g2 = g1 / hh - 0.5
    rho = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), np.array([g1, 2 * g2]) / growth)
    return rho[0] * slope + rho[1] * news


Denoise = Callable[[torch.Tensor, float], torch.Tensor]
OnStep = Callable[[int, torch.Tensor, torch.Tensor], None]


def sample(denoise: Denoise, noise: torch.Tensor, schedule: Schedule, on_step: OnStep | None = None) -> torch.Tensor:
    """Follows `schedule` from `noise` to a clean sample, in float32.

    `denoise(x, sigma) -> velocity` is asked once a step; `on_step(step, x, velocity)` is called after each with the new sample.
    """
    noise = noise.to(torch.float32)
    x, velocities = noise, []
    for step in range(schedule.steps):
        velocities.append(denoise(x, schedule.model_sigma(step)).to(torch.float32))
        x = combine(noise, velocities, schedule.rows[step])
        if on_step is not None:
            on_step(step, x, velocities[-1])
    return x


def combine(noise: torch.Tensor, velocities: list[torch.Tensor], row: tuple[float, ...]) -> torch.Tensor:
    """noise + sum_j row[j] velocities[j]."""
    x = noise.clone()
    for coefficient, velocity in zip(row, velocities, strict=True):
        x.add_(velocity, alpha=coefficient)
    return x
