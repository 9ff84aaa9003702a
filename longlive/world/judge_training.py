"""Trains the judge's network on renders that are drawn, degraded and tracked on the device, a fresh batch for every step.

Its seeds come from the configuration and never meet the evaluation's; it sees all combinations of attributes, held-out ones too, for a
judge must know what it judges. Degradation stands in for a video autoencoder and a generator: blur, blocks, noise, tints, wobble.

Legend: B shots, S = 10 frames of each, N characters, h x w half-size pixels.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..core.files import share
from ..core.log import logger
from .draw import Draw
from .judge_net import HEADS, SAMPLES, JudgeNet, look, sample_times, SPAN
from .perception import HALF, LEAST_AREA, colour_masks, follow
from .render import render, shot_parameters
from .story import Role, ShotTruth, sample_story
from .vocabulary import COLOURS, SPLITS

if TYPE_CHECKING:
    from ..config import Config


def draw_shots(seed: int, step: int, count: int) -> list[tuple[ShotTruth, int]]:
    """`count` shots with the frame (since the shot began) at which each is looked at; half of them at its start."""
    drawn = []
    for index in range(count):
        draw = Draw("judge-training", seed, step, index)
        story = sample_story(draw.below(1 << 48), chunks=1, shots=(1, 1), split=draw.pick(SPLITS))
        drawn.append((story.shots[0], 0 if draw.chance(0.5) else draw.below(400)))
    return drawn


def degrade(frames_BS3hw: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """The same frames (0..255) as a poor codec or generator would show them; strengths differ per shot, wobble and noise per frame."""
    b, s, _, h, w = frames_BS3hw.shape
    device = frames_BS3hw.device

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device, generator=random)

    x = frames_BS3hw
    flat = x.flatten(0, 1)
    for factor in (2, 4):
        soft = F.interpolate(F.avg_pool2d(flat, factor), size=(h, w), mode="bilinear").view_as(x)
        amount = (uniform(b, 1, 1, 1, 1) * 2.2 - 1.2).clamp(0, 1) * (1.0 if factor == 2 else 0.8)
        x = torch.lerp(x, soft, amount)
    wobble = F.interpolate(torch.randn(b * s, 2, 7, 11, device=device, generator=random), size=(h, w), mode="bicubic")
    wobble = wobble.view(b, s, 2, h, w) * (uniform(b, 1, 1, 1, 1) ** 2 * 1.2) * torch.tensor([2 / w, 2 / h], device=device).view(2, 1, 1)
    theta = torch.eye(2, 3, device=device).expand(b * s, 2, 3)
    grid = F.affine_grid(theta, [b * s, 3, h, w], align_corners=False) + wobble.flatten(0, 1).permute(0, 2, 3, 1)
    x = F.grid_sample(x.flatten(0, 1), grid, align_corners=False, padding_mode="border").view_as(x)
    gain = 1 + (uniform(b, 1, 3, 1, 1) - 0.5) * 0.16
    lift = (uniform(b, 1, 3, 1, 1) - 0.5) * 24
    noise = torch.randn(x.shape, device=device, generator=random) * (uniform(b, 1, 1, 1, 1) ** 2 * 22)
    return (x * gain + lift + noise).clamp(0, 255)


def make_batch(
    shots: list[tuple[ShotTruth, int]], device: torch.device, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Crops, track features, labels per head [N] and weight [N] (0 where the colour is hardly visible) of all characters in `shots`."""
    times = torch.tensor(sample_times(SPAN))
    rows = torch.cat([shot_parameters(shot, times + begin) for shot, begin in shots]).to(device)
    full = (render(rows) + 1) * 127.5
    frames = degrade(F.interpolate(full, size=HALF, mode="area").view(len(shots), SAMPLES, 3, *HALF), random)
    roles: list[tuple[int, Role]] = [(index, role) for index, (shot, _) in enumerate(shots) for role in shot.roles]
    owner = torch.tensor([index for index, _ in roles], device=device)
    colour = torch.tensor([COLOURS.index(role.character.colour) for _, role in roles], device=device)
    masks = colour_masks(frames.flatten(0, 1)).view(len(shots), SAMPLES, len(COLOURS), *HALF)
    mine = masks[owner, :, colour]
    centre, area = follow(mine.flatten(0, 1))
    centre, area = centre.view(-1, SAMPLES, 2), area.view(-1, SAMPLES)
    crops, track = look(frames[owner], mine, centre, area)
    names = {
        "shape": [role.character.shape for _, role in roles],
        "action": [role.action for _, role in roles],
        "marking": [role.character.marking for _, role in roles],
        "size": [role.character.size for _, role in roles],
    }
    labels = {head: torch.tensor([HEADS[head].index(name) for name in names[head]], device=device) for head in HEADS}
    return crops, track, labels, (area.mean(1) >= LEAST_AREA).float()


def save_judge(net: JudgeNet, path: Path, metadata: dict[str, str]) -> None:
    """float16 safetensors, never half written."""
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    save_file({name: value.detach().half().cpu().contiguous() for name, value in net.state_dict().items()}, str(temporary), metadata)
    share(temporary)
    os.replace(temporary, path)


def _progress(config: "Config", step: int, seconds: float) -> float:
    """How much of the run is over, 0..1: by steps or by seconds, whichever is further."""
    limit = config.training.max_seconds
    return min(1.0, max((step + 1) / config.training.max_iters, seconds / limit if limit > 0 else 0.0))


def train_judge(config: "Config", logdir: Path) -> dict[str, float]:
    """Trains for training.max_iters steps or training.max_seconds (after the first step), whichever ends first.

    Reads training.lr, batch_size (shots a step), weight_decay, max_grad_norm, warmup_steps and logging.seed. Writes judge.safetensors and
    metrics.jsonl (step, loss, accuracy per head over the last 20 steps, seconds) under `logdir`; returns the last row.
    """
    settings = config.training
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logdir = Path(logdir)
    logdir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.logging.seed)
    net = JudgeNet().to(device)
    random = torch.Generator(device).manual_seed(config.logging.seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    seconds, begun, recent = 0.0, 0.0, []
    with open(logdir / "metrics.jsonl", "w", encoding="utf-8") as metrics:
        for step in range(settings.max_iters):
            over = _progress(config, step, seconds)
            rate = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup_steps)) * (1 - max(0.0, over - 0.3) / 0.7) ** 1.5
            for group in optimizer.param_groups:
                group["lr"] = max(rate, settings.lr * 1e-3)
            crops, track, labels, weight = make_batch(draw_shots(config.logging.seed, step, settings.batch_size), device, random)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = net(crops, track)
            losses = {head: F.cross_entropy(value.float(), labels[head], reduction="none", label_smoothing=0.02) for head, value in logits.items()}
            share = {"shape": 1.0, "action": 1.0, "marking": 0.3, "size": 0.3}
            loss = sum(share[head] * (value * weight).sum() for head, value in losses.items()) / weight.sum().clamp(min=1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), settings.max_grad_norm)
            optimizer.step()
            recent.append({head: ((value.argmax(1) == labels[head]) * weight).sum() / weight.sum().clamp(min=1) for head, value in logits.items()})
            begun = begun or time.monotonic()
            seconds = time.monotonic() - begun
            if (step + 1) % 20 == 0 or over >= 1:
                row = {head: round(float(torch.stack([r[head] for r in recent]).mean()), 4) for head in HEADS}
                row = {"step": step + 1, "loss": round(float(loss.detach()), 5), **row, "seconds": round(seconds, 2)}
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                recent.clear()
                if (step + 1) % 200 == 0:
                    logger.info("judge %s", row)
            if over >= 1:
                break
    notes = {"kind": "judge", "steps": str(step + 1), "seed": str(config.logging.seed), "metrics": json.dumps(row)}
    save_judge(net, logdir / "judge.safetensors", notes)
    return row
