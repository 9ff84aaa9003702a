"""Attention over a whole training sequence in dense parts: equal to the masked definition, with its gradients, for any number of streams."""

import pytest
import torch

from longlive.core.errors import ConfigError, InputError
from longlive.core.tokens import Tokens
from longlive.ops.attention import attention
from longlive.ops.masks import dense_mask
from longlive.ops.merged_attention import film_attention, part_kernel

CHUNKS, SIZE, HEADS, FEATURES = 3, 4, 2, 6


def qkv(streams, dtype=torch.float64, batch=2, size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, streams * CHUNKS * size, HEADS, FEATURES)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def masked(q, k, v, streams, kernel="math"):
    """The definition: a dense mask from the rule on the tokens' metadata."""
    chunk_F = torch.arange(CHUNKS).repeat(streams)
    none = torch.zeros(1, 1)
    tokens = Tokens(none, chunk_F, torch.arange(streams * CHUNKS) >= CHUNKS, none.long(), 1, SIZE)
    return attention(q, k, v, dense_mask(tokens), kernel=kernel)


def gradients(out, inputs):
    return torch.autograd.grad((out.double() * torch.arange(out.numel()).view(out.shape).cos()).sum(), inputs)


@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_parts_equal_the_mask_and_its_gradients(streams, dtype, tolerance):
    inputs, exact = qkv(streams, dtype), qkv(streams)
    out, _ = film_attention(*inputs, streams=streams, chunks=CHUNKS, kernel="math")
    truth = masked(*exact, streams)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance)
    for mine, right in zip(gradients(out, inputs), gradients(truth, exact)):
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=10 * tolerance)


def test_gradients_by_finite_differences():
    inputs = [t[:1, :, :1, :2].detach().requires_grad_() for t in qkv(2)]
    assert torch.autograd.gradcheck(lambda *t: film_attention(*t, streams=2, chunks=CHUNKS, kernel="math")[0], inputs)


def test_strided_inputs_and_inputs_that_stay_as_they_were():
    """An exchange between ranks hands q, k and v over as interleaved views."""
    plain = qkv(2, batch=1)
    joined = torch.stack([t.detach() for t in plain], dim=2).requires_grad_()
    kept = joined.detach().clone()
    out, _ = film_attention(*joined.unbind(2), streams=2, chunks=CHUNKS, kernel="math")
    want, _ = film_attention(*plain, streams=2, chunks=CHUNKS, kernel="math")
    torch.testing.assert_close(out, want, rtol=0, atol=1e-14)
    for mine, right in zip(gradients(out, joined)[0].unbind(2), gradients(want, plain)):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-13)
    assert torch.equal(joined.detach(), kept)


def test_a_recomputation_reuses_what_was_read():
    inputs = qkv(2)
    out, read = film_attention(*inputs, streams=2, chunks=CHUNKS, kernel="math")
    want = gradients(out, inputs)
    marked = read._replace(out_BNHd=read.out_BNHd.clone())
    again, _ = film_attention(*inputs, streams=2, chunks=CHUNKS, kernel="math", read=marked)
    assert again.data_ptr() == marked.out_BNHd.data_ptr() and not marked.out_BNHd.requires_grad and not read.out_BNHd.requires_grad
    for mine, right in zip(gradients(again, inputs), want):
        assert torch.equal(mine, right)


def test_wrong_layouts_and_kernels_are_refused():
    q, k, v = qkv(2)
    with pytest.raises(InputError, match="5 chunks"):
        film_attention(q, k, v, streams=2, chunks=5, kernel="math")
    with pytest.raises(ConfigError, match="cudnn, flash, math"):
        film_attention(q, k, v, streams=2, chunks=CHUNKS, kernel="fastest")


def test_a_cpu_has_no_kernel_that_pays():
    assert part_kernel(torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize("batch, streams", [(1, 2), (2, 3)])
def test_the_operators_of_a_gpu_are_called_as_they_are_declared(kernel, batch, streams):
    """Shapes only: no memory, no card."""
    q, k, v = (torch.empty(batch, streams * CHUNKS * 128, 4, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    out, read = film_attention(q, k, v, streams=streams, chunks=CHUNKS, kernel=kernel)
    assert out.shape == q.shape and read.lse.shape[:4] == (batch * streams, CHUNKS, 4, 128) and read.lse.dtype == torch.float32
    for gradient in torch.autograd.grad(out, (q, k, v), torch.empty_like(out)):
        assert gradient.shape == q.shape and gradient.dtype == torch.bfloat16
