"""A bank of latent clips in device memory: every clip is encoded once and drawn many times.

A clip is one stream of whole chunks with the prompt of each chunk. Slots are filled and refilled in order; whoever fills the bank decides
what a clip is (rendered worlds here, video files elsewhere).

Legend: N slots, B batch, F latent frames, c chunks, C latent channels, H W latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LatentClip:
    """latents_FCHW normalised; area_FHW in [0, 1], how much of a latent pixel shows a character; one prompt and cut flag per chunk."""

    latents_FCHW: torch.Tensor
    area_FHW: torch.Tensor
    prompts: tuple[str, ...]
    cuts: tuple[bool, ...]


@dataclass(frozen=True)
class LatentBatch:
    """latents_BFCHW float32, area_BFHW float32, the slot of each sample (int64 on the device), cuts per sample and chunk."""

    latents_BFCHW: torch.Tensor
    area_BFHW: torch.Tensor
    slot_B: torch.Tensor
    cuts: tuple[tuple[bool, ...], ...]


class LatentBank:
    """`slots` clips of `frames` x `channels` x `height` x `width` in bfloat16 on `device`."""

    def __init__(self, slots: int, frames: int, channels: int, height: int, width: int, device: torch.device):
        self.latents_NFCHW = torch.zeros(slots, frames, channels, height, width, dtype=torch.bfloat16, device=device)
        self.area_NFHW = torch.zeros(slots, frames, height, width, dtype=torch.float16, device=device)
        self.cuts: list[tuple[bool, ...]] = [()] * slots

    def __len__(self) -> int:
        return len(self.cuts)

    @property
    def nbytes(self) -> int:
        return self.latents_NFCHW.nbytes + self.area_NFHW.nbytes

    def put(self, slot: int, clip: LatentClip) -> None:
        self.latents_NFCHW[slot] = clip.latents_FCHW.to(self.latents_NFCHW)
        self.area_NFHW[slot] = clip.area_FHW.to(self.area_NFHW)
        self.cuts[slot] = clip.cuts

    def draw(self, count: int, generator: torch.Generator) -> LatentBatch:
        """`count` different slots (with repeats only where the bank is smaller), drawn by a CPU generator."""
        slots = torch.randperm(len(self), generator=generator)[:count].tolist() if count <= len(self) else None
        slots = torch.randint(len(self), (count,), generator=generator).tolist() if slots is None else slots
        index = torch.tensor(slots).to(self.latents_NFCHW.device, non_blocking=True)
        return LatentBatch(
            self.latents_NFCHW[index].float(),
            self.area_NFHW[index].float(),
            index,
            tuple(self.cuts[s] for s in slots),
        )
