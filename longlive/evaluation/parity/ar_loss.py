"""Teacher-forcing loss and gradients, recomputed from recorded draws.

Draws arrive one per frame; a chunk takes the one of its first frame. A recorded noise on the history (`timestep_raw.1`) uses the same
noise tensor and is told to the network; a recorded first latent (`initial_latent`) is the image of image-to-video. The recorded x0 looks
its level up in the training table, where timestep 0 means the last entry.

Legend: B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

import torch

from ...diffusion.flow import train_table, x0_from_velocity
from ...models.spec import DiTDims
from ...models.wan_dit import WanDiT
from ...train.objective import FlowTarget, flow_target, frame_errors, know_first_frames, masked_mean, mix, per_frame
from ...train.teacher_forcing import Film, frame_positions, teacher_forced_velocity
from .entries import Entry

SHIFT = 5.0


def _network(entry: Entry) -> WanDiT:
    sizes = entry.config["dit"]
    dims = DiTDims(
        dim=sizes["dim"], heads=sizes["heads"], ffn=sizes["ffn"], layers=sizes["layers"], freq_dim=sizes["freq_dim"],
        text_dim=sizes["text_dim"], text_len=sizes["text_len"], channels=sizes["ch"],
    )  # fmt: skip
    dit = WanDiT(dims)
    dit.load_state_dict(entry.weights["student"])
    return dit


def _prepare(entry: Entry) -> tuple[torch.Tensor, torch.Tensor, FlowTarget]:
    """Context latents, their sigma, and the noisy copy."""
    given, size = entry.inputs, entry.config["frames_per_chunk"]
    clean, table = given["clean"], train_table(SHIFT)
    flow = flow_target(clean, given["noise"], given["timestep_raw.0"][:, ::size], table, given.get("loss_mask"))
    context, context_sigma = clean, torch.zeros(clean.shape[:2], dtype=torch.float64)
    if "timestep_raw.1" in given:
        index = per_frame(given["timestep_raw.1"][:, ::size], size)
        context, context_sigma = mix(clean, given["noise"], table.sigmas[index]), table.timesteps[index].double() / 1000
    if entry.config["i2v"]:
        flow = know_first_frames(flow, clean, torch.ones(len(clean), dtype=torch.int64))
    return context, context_sigma, flow


def run(entry: Entry) -> dict[str, torch.Tensor]:
    """The recorded outputs of one `ar_loss` entry, those in `entry.wanted`."""
    dit = _network(entry)
    context, context_sigma, flow = _prepare(entry)
    batch, frames = context.shape[:2]
    chunks = frames // entry.config["frames_per_chunk"]
    positions = frame_positions([[False] * chunks] * batch, entry.config["frames_per_chunk"], 0.0)
    film = Film(torch.arange(batch * chunks).reshape(batch, chunks), positions)
    text = dit.text(list(entry.inputs["context"]))
    (velocity,) = teacher_forced_velocity(dit, text, film, (context, context_sigma), [(flow.noisy_BFCHW, flow.sigma_BF)])
    loss = masked_mean(frame_errors(velocity, flow.target_BFCHW), flow.weight_BF, flow.mask_BF)
    loss.backward()
    table, timestep = train_table(SHIFT), (flow.sigma_BF * 1000).float()
    out = {
        "loss": loss.detach().reshape(1),
        "flow": velocity.detach(),
        "x0": x0_from_velocity(flow.noisy_BFCHW, velocity.detach(), table.sigmas[table.nearest(timestep)]),
        "noisy": flow.noisy_BFCHW,
        "timestep": timestep,
        "clean_context": context,
        "aug_t": (context_sigma * 1000).float(),
        **{f"grad.{name}": p.grad for name, p in dit.named_parameters()},
    }
    return {name: out[name] for name in entry.wanted}
