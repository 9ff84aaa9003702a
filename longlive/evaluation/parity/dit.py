"""Recomputes recorded runs of the transformer: bidirectional, teacher-forced and chunk by chunk with a window of pages.

Legend: B batch, F latent frames, C channels, H, W latent rows and columns, N tokens, G groups.
"""

from __future__ import annotations

from typing import Any

import torch

from ...cache.attend import Full, TeacherForced
from ...core.errors import InputError, NotAvailable
from ...core.geometry import PATCH
from ...core.tokens import Tokens
from ...diffusion.flow import train_table, x0_from_velocity
from ...diffusion.known import KnownFrames
from ...engine.rollout import Rollout, RolloutSettings
from ...models.patch import patchify, unpatchify
from ...models.spec import DiTDims
from ...models.wan_dit import WanDiT
from .entries import Entry

WRAPPER_SHIFT = 5.0


def run(entry: Entry) -> dict[str, torch.Tensor]:
    """The wanted outputs of a `dit_*` file."""
    modes = {"dit_bidirectional": _bidirectional, "dit_teacher_forcing": _teacher_forcing, "dit_cached_rollout": _rollout}
    if entry.mode not in modes:
        raise NotAvailable(f"mode {entry.mode!r} of the transformer", f"the modes are {', '.join(modes)}")
    out = modes[entry.mode](entry, _model(entry))
    return {name: out[name] for name in entry.wanted if name in out}


def _model(entry: Entry) -> WanDiT:
    sizes = dict(entry.config["dit"])
    dit = WanDiT(DiTDims(channels=sizes.pop("ch"), **sizes))
    dit.load_state_dict(entry.weights["dit"])
    return dit


def _bidirectional(entry: Entry, dit: WanDiT) -> dict[str, torch.Tensor]:
    """Zero padding to seq_len is masked in the recording; here there is none."""
    given = entry.inputs
    z_BFCHW = given["x"].transpose(1, 2)
    batch, frames, _, rows, columns = z_BFCHW.shape
    rows, columns = rows // PATCH, columns // PATCH
    prompt = torch.arange(batch)[:, None]
    position = torch.arange(frames, dtype=torch.float64)[None]
    layout = torch.zeros(frames, dtype=torch.int64)
    tokens = Tokens(position, layout, layout.bool(), prompt, rows, columns)
    x_BNc = patchify(z_BFCHW)

    @torch.no_grad()
    def flow(sigma_BG: torch.Tensor) -> torch.Tensor:
        out = dit(x_BNc, tokens, sigma_BG, dit.text(list(given["context"])), Full(tokens, dit.dims.head_dim))
        return unpatchify(out, frames, rows, columns).transpose(1, 2)

    out = {"flow": flow(given["t"].double()[:, None] / 1000)}
    if "t_token" in given:
        out["flow_token"] = flow(given["t_token"][:, : x_BNc.shape[1]].double() / 1000)
    return out


def _teacher_forcing(entry: Entry, dit: WanDiT) -> dict[str, torch.Tensor]:
    """kind `tf`: [clean; noisy]; `causal`: one copy, chunk by chunk; `causal_first`: likewise, with the first frame a chunk of its own."""
    given, kind = entry.inputs, entry.config["kind"]
    noisy = given["noisy"]
    batch, frames, _, rows, columns = noisy.shape
    halves = [given["clean"], noisy] if kind == "tf" else [noisy]
    levels = [_clean_level(given), given["timestep"]] if kind == "tf" else [given["timestep"]]
    step = entry.config["frames_per_chunk"]
    chunk = torch.arange(frames) // step
    if kind == "causal_first":
        chunk = (torch.arange(frames) + step - 1) // step
    position = torch.arange(frames, dtype=torch.float64).expand(batch, -1)
    if "rope_offset" in given:
        position = position + given["rope_offset"].double()
    copies = len(halves)
    prompt = torch.arange(len(given["context"])).view(batch, -1).repeat(1, copies)
    tokens = Tokens(
        position.repeat(1, copies),
        chunk.repeat(copies),
        torch.arange(frames * copies) >= frames,
        prompt,
        rows // PATCH,
        columns // PATCH,
    )
    attend = TeacherForced(tokens, dit.dims.head_dim, t_scale=entry.config.get("t_scale") or 1.0)
    sigma_BF = torch.cat(levels, dim=1).double() / 1000
    out_BNc = dit(patchify(torch.cat(halves, dim=1)), tokens, sigma_BF, dit.text(list(given["context"])), attend)
    flow = unpatchify(out_BNc, frames * copies, tokens.height, tokens.width)[:, -frames:]
    out = {"flow": flow, "x0": _wrapper_x0(noisy, flow, given["timestep"])}
    if "probe" in given:
        (flow * given["probe"]).sum().backward()
        out |= {f"grad.{name}": p.grad for name, p in dit.named_parameters() if p.grad is not None}
    return {name: tensor.detach() for name, tensor in out.items()}


def _clean_level(given: dict[str, torch.Tensor]) -> torch.Tensor:
    return given["aug_t"] if "aug_t" in given else torch.zeros_like(given["timestep"])


def _wrapper_x0(noisy: torch.Tensor, flow: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The published wrapper looks sigma up in the training table."""
    table = train_table(WRAPPER_SHIFT)
    return x0_from_velocity(noisy, flow, table.sigmas[table.nearest(timestep)])


def rollout_settings(config: dict[str, Any]) -> RolloutSettings:
    """RolloutSettings from a recorded pipeline's configuration; InputError where we refuse it."""
    return RolloutSettings(
        chunk_frames=config["frames_per_chunk"],
        window_frames=config["local_attn_frames"],
        sink_frames=config["sink_frames"],
        multi_shot=config["multi_shot_sink"],
        shot_offset=config["multi_shot_rope_offset"],
        recache=config["shot_clean_recache"],
        relative=config["use_relative_rope"],
        t_scale=config.get("t_scale") or 1.0,
        steps=config["sampling_steps"],
        shift=config["timestep_shift"],
        guidance=config["guidance_scale"],
    )


def _rollout(entry: Entry, dit: WanDiT) -> dict[str, torch.Tensor]:
    config, given = entry.config, entry.inputs
    if config.get("kv_quant"):
        raise NotAvailable("quantised keys and values", "leave kv_quant out")
    if config["independent_first_frame"] and "initial_latent" not in given:
        raise InputError("independent_first_frame without a first latent: a film is whole chunks; give initial_latent or switch it off")
    settings = rollout_settings(config)
    batch, frames, _, rows, columns = given["noise"].shape
    rollout = Rollout(
        dit, settings, token_height=rows // PATCH, token_width=columns // PATCH, batch=batch, device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        text = dit.text(list(given["prompt_table"]))
    row = {prompt: i for i, prompt in enumerate(config["prompt_texts"])}
    prefix, prompts = config["scene_cut_prefix"], config["prompts"]
    known = KnownFrames(given["initial_latent"]) if "initial_latent" in given else None
    latents, steps = [], []
    for chunk, noise in enumerate(given["noise"].split(settings.chunk_frames, dim=1)):
        texts = [sample[chunk] for sample in prompts]
        latents.append(
            rollout.step(
                noise,
                text,
                [row[t] for t in texts],
                [bool(prefix) and t.startswith(prefix) for t in texts],
                negative=row.get(config["negative_prompt"]),
                known=known,
                on_step=lambda step, x, v: steps.append((x, v)),
            )
        )
    out = {
        "latents": torch.cat(latents, dim=1),
        "timesteps": torch.tensor(rollout.schedule.timesteps),
        "sigmas": torch.tensor(rollout.schedule.sigmas),
        "cache_k_last": _keys_in_order(rollout),
    }
    if len(steps) == len(latents) * settings.steps:
        for index, name in enumerate(("step_latents", "flow")):
            out[name] = torch.stack([s[index] for s in steps]).unflatten(0, (-1, settings.steps))
    return out


def _keys_in_order(rollout: Rollout) -> torch.Tensor:
    """Keys of layer 0 [B, tokens, heads, head_dim], oldest chunk first."""
    windows = rollout.state.windows
    slots = torch.tensor([[w.slots.index(c) for c in w.order] for w in windows])
    return rollout.stores[0].copy_out(0, slots)[0]
