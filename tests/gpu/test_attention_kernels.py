"""Merged attention on a GPU: cuDNN's and FlashAttention's operators against float32, and the path that teacher forcing takes by itself."""

import pytest
import torch

from longlive.cache.attend import PLAIN, TeacherForced
from longlive.core.tokens import Tokens
from longlive.ops.merged_attention import film_attention, part_kernel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CHUNKS, SIZE = 3, 256


def apart(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def run(inputs, grad, kernel, streams):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out, _ = film_attention(*inputs, streams=streams, chunks=CHUNKS, kernel=kernel)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize("streams, batch, features", [(1, 1, 128), (2, 1, 128), (3, 2, 64)])
def test_half_precision_is_close_to_float32(kernel, streams, batch, features):
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, streams * CHUNKS * SIZE, 4, features)
    *inputs, grad = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(4))
    truth = run([t.float() for t in inputs], grad.float(), "math", streams)
    for mine, right in zip(run(inputs, grad, kernel, streams), truth):
        assert mine.isfinite().all() and apart(mine, right) < 0.01


def test_teacher_forcing_takes_it_and_agrees_with_the_plain_path():
    frames, rows, columns = 2 * CHUNKS, 8, 16
    position = torch.arange(frames // 2, dtype=torch.float64, device="cuda").repeat(1, 2)
    chunk = torch.arange(CHUNKS).repeat(2)
    tokens = Tokens(position, chunk, torch.arange(frames) >= frames // 2, torch.zeros(1, 1, dtype=torch.int64), rows, columns)
    generator = torch.Generator("cuda").manual_seed(0)
    found = []
    for kernel in ("auto", PLAIN):
        generator.manual_seed(0)
        q, k, v, grad = (torch.randn(1, frames * rows * columns, 4, 128, generator=generator, device="cuda").bfloat16().requires_grad_() for _ in range(4))
        assert part_kernel(q) in ("cudnn", "flash")
        out = TeacherForced(tokens, 128, kernel=kernel)(q, k, v, 0)
        found.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad.detach())])
    for mine, plain in zip(*found):
        assert apart(mine, plain) < 0.01
