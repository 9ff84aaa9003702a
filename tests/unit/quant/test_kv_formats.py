"""Formats of cached keys and values."""

from __future__ import annotations

import pytest
import torch

from longlive.core.errors import ConfigError, InputError
from longlive.ops.attention import attention
from longlive.ops.kv_formats import FORMATS, dequantise_page, quantise_page, token_mean
from longlive.ops.nvfp4 import quantise

BOUND = {"fp8": 1.1e-3, "int8": 1.2e-4, "nvfp4": 1.1e-2}  # relative squared error of what is left without the mean (spec nvfp4 §1.7)


def page(tokens=130, heads=3, seed=0, offset=3.0):
    """Keys [2, L, H, 32] with strong means of channels, as unrotated keys have."""
    generator = torch.Generator().manual_seed(seed)
    mean = offset * torch.randn(2, 1, heads, 32, generator=generator)
    return (torch.randn(2, tokens, heads, 32, generator=generator) + mean).bfloat16()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 64, 130])
def test_error_is_that_of_the_format_on_what_is_left_without_the_mean(format, tokens):
    x = page(tokens)
    back = dequantise_page(quantise_page(x, format))
    assert back.shape == x.shape
    rest = x.float() - token_mean(x).unsqueeze(1)
    assert (back - x.float()).square().sum() <= BOUND[format] * rest.square().sum() + 1e-9


@pytest.mark.parametrize("format", FORMATS)
def test_taking_the_mean_off_pays(format):
    x = page(offset=5.0)
    with_mean = (dequantise_page(quantise_page(x, format)) - x.float()).square().sum()
    centred = (x.float() - token_mean(x).unsqueeze(1)).square().sum() / x.float().square().sum()
    assert with_mean < 2 * BOUND[format] * centred * x.float().square().sum()
    if format == "nvfp4":
        plain = (quantise(x.flatten(0, -2)).dequantise(torch.float32) - x.float().flatten(0, -2)).square().sum()
        assert with_mean < plain / 5


@pytest.mark.parametrize("format", FORMATS)
def test_heads_are_independent(format):
    """What a rank with some heads keeps is what a rank with all of them keeps of these, bit for bit."""
    x = page()
    whole, alone = (dequantise_page(quantise_page(part, format)) for part in (x, x[:, :, 1:3]))
    assert torch.equal(whole[:, :, 1:3], alone)
    sample = quantise_page(x[1:], format)
    assert torch.equal(dequantise_page(sample), dequantise_page(quantise_page(x, format))[1:])


@pytest.mark.parametrize(("format", "share"), [("fp8", 0.5), ("int8", 0.53), ("nvfp4", 0.29)])
def test_memory(format, share):
    x = torch.randn(1, 1280, 2, 128).bfloat16()
    assert share - 0.03 < quantise_page(x, format).bytes / x.nbytes < share + 0.02


@pytest.mark.parametrize("format", FORMATS)
def test_constant_and_zero_pages_are_exact(format):
    for value in (0.0, 2.5):
        x = torch.full((1, 10, 2, 32), value)
        assert torch.equal(dequantise_page(quantise_page(x, format)), x)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_is_refused(format):
    x = page()
    x[0, 3, 1, 2] = torch.inf
    with pytest.raises(InputError, match="infinity or NaN"):
        quantise_page(x, format)


def test_attention_over_a_page():
    """Relative squared error of the output, keys and values both kept in the format; nearer with more bits."""
    k, v = page(256, seed=1, offset=2.0).float(), page(256, seed=2, offset=0.5).float()
    q = torch.randn(2, 40, 3, 32, generator=torch.Generator().manual_seed(3))
    exact = attention(q, k, v, kernel="math")
    errors = []
    for format in ("int8", "fp8", "nvfp4"):
        out = attention(q, dequantise_page(quantise_page(k, format)), dequantise_page(quantise_page(v, format)), kernel="math")
        errors.append(((out - exact).square().sum() / exact.square().sum()).item())
    assert errors == sorted(errors) and errors[0] < 2e-5 and errors[-1] < 5e-3


def test_the_mean_over_tokens_never_changes_attention_and_the_published_one_does():
    """Published keys lose their mean over head features, which is no shift of a query's logits; the mean over tokens is one."""
    k, v = page(64).double(), page(64, seed=4).double()
    q = torch.randn(2, 5, 3, 32, dtype=torch.float64)
    exact = attention(q, k, v, kernel="math")
    assert torch.allclose(attention(q, k - token_mean(k).double().unsqueeze(1), v, kernel="math"), exact, atol=1e-9)
    assert not torch.allclose(attention(q, k - k.mean(-1, keepdim=True), v, kernel="math"), exact, atol=1e-3)


def test_unknown_words_are_refused():
    with pytest.raises(ConfigError, match="use one of fp8, int8, nvfp4"):
        quantise_page(page(), "int2")
    with pytest.raises(ConfigError, match="unknown NVFP4 scale rule"):
        quantise_page(page(), "nvfp4", "best")
