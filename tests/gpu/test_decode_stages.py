"""Decode stages on a GPU: a second stream and a second device give the frames of inline decoding, in order, in bounded memory."""

import pytest
import torch
from tiny_pipeline import random_pipeline

from longlive.core.story import Shot, Storyboard
from longlive.engine.session import Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STORY = Storyboard(shots=(Shot(prompt="a red circle", chunks=6), Shot(prompt="a blue star", chunks=6)))


def pipeline_on(kind, decode_device="cuda:0"):
    pipeline = random_pipeline()
    pipeline.device = torch.device("cuda:0")
    pipeline.dit.to(pipeline.device)
    pipeline.codec.to(torch.device(decode_device))
    pipeline.decode_kind = kind
    return pipeline


def frames(pipeline):
    with pipeline.session(Request(storyboards=(STORY,), samples=2)) as session:
        return torch.cat([chunk.frames for chunk in session], dim=1)


@pytest.mark.parametrize("kind, device", [("same-stream", "cuda:0"), ("side-stream", "cuda:0"), ("other-device", "cuda:1"), ("other-device", "cpu")])
def test_a_stage_gives_the_frames_of_inline_decoding(kind, device):
    if device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = frames(pipeline_on("inline"))
    found = frames(pipeline_on(kind, device))
    assert found.shape == expected.shape == (2, 93, 32, 64, 3)
    assert (found.int() - expected.int()).abs().max() <= 2


def test_a_side_stream_tells_frames_in_order_before_their_chunk_is_whole():
    pipeline, told = pipeline_on("side-stream"), []
    pipeline.codec.group = 1
    with pipeline.session(Request(storyboards=(STORY,), samples=2)) as session:
        session.on_frames = told.append
        whole = torch.cat([chunk.frames for chunk in session], dim=1)
    assert len(told) == 24 and torch.equal(torch.cat(told, dim=1), whole)


@pytest.mark.parametrize("kind", ["inline", "same-stream", "side-stream", "other-device"])
def test_a_snapshot_is_exact_on_a_gpu(kind):
    pipeline = pipeline_on(kind)
    with pipeline.session(Request(storyboards=(STORY,))) as session:
        next(session), next(session)
        copy = session.snapshot()
        first = list(session)
        session.restore(copy)
        again = list(session)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.latents_BFCHW, two.latents_BFCHW) and torch.equal(one.frames, two.frames)


def test_device_memory_does_not_grow():
    pipeline = pipeline_on("side-stream")
    story = Storyboard(shots=(Shot(prompt="a red circle", chunks=60),))
    seen = []
    with pipeline.session(Request(storyboards=(story,))) as session:
        for _ in session:
            seen.append(torch.cuda.memory_allocated())
    assert max(seen[10:]) <= max(seen[:10]) * 1.05
