"""Recomputes the recorded schedules: UniPC on given velocities, the training table, the lists of denoising steps."""

from __future__ import annotations

from typing import Any

import torch

from ...core.errors import InputError, NotAvailable
from ...diffusion.flow import (
    add_noise,
    denoising_steps,
    train_table,
    velocity_from_x0,
    velocity_target,
    warp_denoising_steps,
    x0_from_velocity,
)
from ...diffusion.samplers import sample, unipc
from .entries import Entry


def run(entry: Entry) -> dict[str, torch.Tensor]:
    """The wanted outputs of a `sampler` file (config.kind `unipc` or `train`)."""
    kinds = {"unipc": _unipc, "train": _train}
    kind = entry.config["kind"]
    if kind not in kinds:
        raise NotAvailable(f"a sampler of kind {kind!r}", f"the kinds are {', '.join(kinds)}")
    out = kinds[kind](entry.config, entry.inputs)
    return {name: out[name] for name in entry.wanted if name in out}


def _unipc(config: dict[str, Any], given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    schedule = unipc(config["steps"], config["shift"])
    answers = iter(given["model_output"])
    trajectory = []
    sample(lambda x, sigma: next(answers), given["sample"], schedule, lambda step, x, v: trajectory.append(x))
    return {
        "timesteps": torch.tensor(schedule.timesteps),
        "sigmas": torch.tensor(schedule.sigmas),
        "trajectory": torch.stack(trajectory),
    }


def _train(config: dict[str, Any], given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    table = train_table(config["shift"], config["steps"])
    x0, noise, flow = given["x0"], given["noise"], given["flow"]
    index = table.nearest(given["timestep"])
    sigma = table.sigmas[index]
    noisy = add_noise(x0, noise, sigma)
    # The Euler steps were recorded from as many entries, spread evenly over all but the last.
    euler = torch.linspace(0, config["steps"] - 2, len(index)).long()
    return {
        "sigmas": table.sigmas,
        "timesteps": table.timesteps,
        "weights": table.weights,
        "add_noise": noisy,
        "x0_from_flow": x0_from_velocity(noisy, flow, sigma),
        "flow_from_x0": velocity_from_x0(noisy, x0, sigma),
        "training_weight": table.weights[index],
        "training_target": velocity_target(x0, noise),
        "euler_timestep": table.timesteps[euler],
        "euler_step": x0 + flow * (table.sigmas[euler + 1] - table.sigmas[euler]).reshape(-1, *[1] * (x0.dim() - 1)),
    }


def run_case(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """One case of the `denoising_steps` table."""
    if given["kind"] == "default":
        return {"steps": [float(s) for s in denoising_steps(given["sampling_steps"], given["shift"])], "dtype": "torch.int64"}
    if given["kind"] == "warp":
        return {"steps": warp_denoising_steps(given["steps"], given["shift"]).tolist(), "dtype": "torch.float32"}
    raise InputError(f"case {name}: kind {given['kind']!r} is neither default nor warp")
