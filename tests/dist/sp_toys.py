"""A toy film batch for teacher forcing over ranks: everything that one step needs, in float64, from a seed."""

from dataclasses import dataclass

import torch

from longlive.cache.attend import visible_tensor
from longlive.cache.policy import WindowPolicy
from longlive.models.spec import DiTDims
from longlive.models.wan_dit import WanDiT
from longlive.train.objective import FlowTarget, know_first_frames
from longlive.train.teacher_forcing import Film, frame_positions

DIMS = DiTDims(dim=48, ffn=64, layers=2, heads=4, text_dim=8, text_len=12, freq_dim=32, channels=4)
HEIGHT, WIDTH = 2, 4
BATCH, CHUNKS = 4, 4
CUTS = [[False] * 4, [False, True, False, False], [False, False, True, True], [False, True, False, True]]
VALID = [8, 6, 3, 1]


@dataclass(frozen=True)
class Case:
    """What varies between steps. With 2 chunks of 4 frames, 4 ranks hold half a chunk each."""

    copies: int = 1
    window: bool = False
    relative: bool = False
    recache: bool = False
    masked: bool = False
    known: bool = False
    area: bool = False
    one_prompt: bool = False
    chunks: int = CHUNKS
    kind: str = "balanced"
    ahead: bool = False


CASES = {
    "plain": Case(),
    "masked": Case(masked=True),
    "image to video": Case(copies=2, masked=True, known=True),
    "windows, cuts, three copies": Case(copies=3, window=True, masked=True),
    "relative windows": Case(window=True, relative=True),
    "recache": Case(window=True, recache=True),
    "weighted areas": Case(copies=2, masked=True, area=True),
    "chunks split between ranks": Case(chunks=2),
    "one prompt for all": Case(one_prompt=True),
    "contiguous": Case(kind="contiguous"),
    "contiguous, three copies, masked": Case(copies=3, masked=True, window=True, kind="contiguous"),
    "rotated ahead, recomputed, compiled": Case(copies=2, ahead=True),
}
FRAMES = 8


@dataclass(frozen=True)
class Batch:
    embeds: list
    film: Film
    context: tuple
    flows: list
    area_BFHW: torch.Tensor | None

    @property
    def copies(self):
        return [(flow.noisy_BFCHW, flow.sigma_BF) for flow in self.flows]


def toy_dit():
    dit = WanDiT(DIMS)
    generator = torch.Generator().manual_seed(0)
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    return dit.double()


def batch_of(case: Case, samples: list[int]) -> Batch:
    """Samples of the case's batch of `BATCH`; a sample does not depend on which others are asked for."""
    parts = [_sample(case, sample) for sample in samples]
    embeds = _sample(case, 0)[0][:1] if case.one_prompt else [e for part in parts for e in part[0]]
    chunk_frames = FRAMES // case.chunks
    cuts = [[*CUTS[s]][: case.chunks] for s in samples]
    visible = committed = None
    if case.window:
        policy = WindowPolicy(pages=3, anchor=True, pin=True, recache=case.recache)
        visible = visible_tensor(cuts, policy)
        committed = visible_tensor(cuts, policy, commit=True) if case.recache else None
    prompts = torch.zeros(len(samples), case.chunks, dtype=torch.int64) if case.one_prompt else torch.arange(len(embeds)).reshape(len(samples), -1)
    film = Film(prompts, frame_positions(cuts, chunk_frames, 3.0), visible, committed, relative=case.relative)
    joined = [torch.stack(tensors) for tensors in zip(*(part[1] for part in parts))]
    flows = []
    for copy in range(case.copies):
        noisy, target, sigma, weight = (t[:, copy] for t in joined[2:6])
        mask = torch.ones_like(weight)
        if case.masked:
            mask = (torch.arange(FRAMES)[None] < torch.tensor([VALID[s] for s in samples])[:, None]).double()
        flow = FlowTarget(noisy, target, sigma, weight, mask)
        flows.append(know_first_frames(flow, joined[0], torch.tensor([s % 3 for s in samples])) if case.known else flow)
    return Batch(embeds, film, (joined[0], joined[1]), flows, joined[6] if case.area else None)


def _sample(case: Case, sample: int):
    g = torch.Generator().manual_seed(100 * sample + 7)
    embeds = [torch.randn(i % 5 + 1, DIMS.text_dim, generator=g, dtype=torch.float64) for i in range(case.chunks)]
    shape = (FRAMES, DIMS.channels, HEIGHT, WIDTH)
    clean = torch.randn(shape, generator=g, dtype=torch.float64)
    copies = [torch.randn(case.copies, *shape, generator=g, dtype=torch.float64) for _ in range(2)]
    levels = [torch.rand(case.copies, case.chunks, generator=g, dtype=torch.float64) for _ in range(2)]
    sigma, weight = (level.repeat_interleave(FRAMES // case.chunks, 1) for level in levels)
    area = torch.rand(FRAMES, HEIGHT, WIDTH, generator=g, dtype=torch.float64) + sample
    return embeds, (clean, torch.zeros(FRAMES, dtype=torch.float64), *copies, sigma, weight, area)
