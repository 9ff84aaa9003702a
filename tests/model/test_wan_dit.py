"""The transformer alone: published names, exact padding, one noise level per frame, half precision, compilation."""

import pytest
import torch
from dit_toys import COLUMNS, DIMS, ROWS, ask, film_tokens, toy_dit, toy_prompts

from longlive.cache.attend import Full, TeacherForced
from longlive.core.errors import InputError
from longlive.models.patch import patchify, unpatchify
from longlive.models.spec import WAN22_TI2V_5B
from longlive.models.wan_dit import WanDiT, padding_biases
from longlive.ops.attention import KERNELS, attention


def one_chunk(batch=1, frames=2, copies=1):
    position = torch.arange(frames, dtype=torch.float64).expand(batch, -1)
    return film_tokens(torch.arange(batch)[:, None], position, copies)


def latents(batch=1, frames=2, dtype=torch.float64):
    return torch.randn(batch, frames, DIMS.channels, 2 * ROWS, 2 * COLUMNS, dtype=dtype, generator=torch.Generator().manual_seed(3))


def test_names_and_size_of_the_5b_model():
    with torch.device("meta"):
        dit = WanDiT(WAN22_TI2V_5B.dit)
    state = dit.state_dict()
    assert sum(p.numel() for p in state.values()) == 4_999_787_712 and len(state) == 825
    assert state["patch_embedding.weight"].shape == (3072, 48, 1, 2, 2)
    assert state["blocks.29.cross_attn.norm_k.weight"].shape == (3072,)
    assert sum(isinstance(m, torch.nn.Linear) for m in dit.modules()) == 306


def test_patch_embedding_is_the_published_convolution():
    dit, z = toy_dit(), latents()
    want = torch.nn.functional.conv3d(z.transpose(1, 2), dit.patch_embedding.weight, dit.patch_embedding.bias, stride=(1, 2, 2))
    assert torch.allclose(dit.patch_embedding(patchify(z)), want.flatten(2).transpose(1, 2), atol=1e-12)


def test_unpatchify_puts_the_channel_fastest():
    y = torch.arange(4.0 * 3).view(1, 1, 12)
    z = unpatchify(y, 1, 1, 1)
    assert z[0, 0, 2, 1, 0] == (1 * 2 + 0) * 3 + 2


@pytest.mark.parametrize("length", [0, 3, DIMS.text_len - 1, DIMS.text_len])
def test_one_key_stands_for_all_padding(length):
    dit, z, tokens = toy_dit(), latents(), one_chunk()
    vectors = torch.randn(length, DIMS.text_dim, generator=torch.Generator().manual_seed(0))
    padded = torch.cat((vectors, torch.zeros(DIMS.text_len - length, DIMS.text_dim)))
    attend, sigma = Full(tokens, DIMS.head_dim), torch.full((1, 2), 0.5)
    with torch.no_grad():
        folded, dense = (ask(dit, z, tokens, sigma, dit.text([e]), attend) for e in (vectors, padded))
    assert torch.allclose(folded, dense, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 37, 500, 512])
def test_padding_biases_are_exact_in_half_precision(count):
    biases = torch.tensor(padding_biases(count))
    assert biases.exp().sum().item() == pytest.approx(count, rel=1e-6)
    assert biases.bfloat16().double().exp().sum().item() == pytest.approx(count, rel=2e-4)


def test_rows_of_different_length_equal_the_same_rows_alone():
    dit, z, tokens = toy_dit(), latents(3), one_chunk(3)
    prompts = toy_prompts(3)
    attend, sigma = Full(tokens, DIMS.head_dim), torch.rand(3, 2)
    together = ask(dit, z, tokens, sigma, dit.text(prompts), attend)
    for i in range(3):
        single = one_chunk()
        alone = ask(dit, z[i : i + 1], single, sigma[i : i + 1], dit.text([prompts[i]]), Full(single, DIMS.head_dim))
        assert torch.allclose(together[i], alone[0], atol=1e-10)


def test_a_prompt_that_is_too_long_is_refused():
    with pytest.raises(InputError, match="text_len"):
        toy_dit().text([torch.zeros(DIMS.text_len + 1, DIMS.text_dim)])


def test_noise_level_per_frame_per_token_or_for_all():
    dit, z, tokens = toy_dit(), latents(), one_chunk()
    attend, text = Full(tokens, DIMS.head_dim), dit.text(toy_prompts(1))
    outs = [ask(dit, z, tokens, torch.full((1, g), 0.7), text, attend) for g in (1, 2, 2 * ROWS * COLUMNS)]
    assert torch.allclose(outs[0], outs[1], atol=1e-12) and torch.allclose(outs[0], outs[2], atol=1e-12)


def test_text_keys_are_kept_without_gradients_and_dropped_when_weights_change():
    dit, z, tokens = toy_dit(), latents(), one_chunk()
    attend, sigma = Full(tokens, DIMS.head_dim), torch.full((1, 2), 0.5)
    with torch.no_grad():
        text = dit.text(toy_prompts(1))
        ask(dit, z, tokens, sigma, text, attend)
        first = text.kept(0)
        ask(dit, z, tokens, sigma, text, attend)
        assert text.kept(0)[0] is first[0]
        dit.blocks[0].cross_attn.v.weight.mul_(2)
        dit.text_embedding[0].weight.mul_(0.5)
        changed = ask(dit, z, tokens, sigma, text, attend)
        assert torch.equal(changed, ask(dit, z, tokens, sigma, dit.text(toy_prompts(1)), attend))
    assert text.kept(0) is None  # gradients are on here
    text = dit.text(toy_prompts(1))
    ask(dit, z, tokens, sigma, text, attend).sum().backward()
    assert dit.blocks[1].cross_attn.k.weight.grad.abs().sum() > 0 and dit.text_embedding[2].weight.grad.abs().sum() > 0


def test_until_kv_hands_over_every_layer_and_computes_no_more():
    dit, z, tokens = toy_dit(), latents(), one_chunk()
    full, seen, calls = Full(tokens, DIMS.head_dim), [], []

    def attend(q, k, v, layer):
        seen.append((layer, q is None, k, v))
        return full(q, k, v, layer)

    for module in (dit.blocks[-1].ffn, dit.blocks[-1].cross_attn, dit.blocks[-1].self_attn.o, dit.head):
        module.register_forward_hook(lambda *_: calls.append(1))
    text, sigma = dit.text(toy_prompts(1)), torch.zeros(1, 2)
    with torch.no_grad():
        assert dit(patchify(z), tokens, sigma, text, attend, until="kv") is None
        assert [s[:2] for s in seen] == [(0, False), (1, True)] and not calls
        dit(patchify(z), tokens, sigma, text, attend)
    for early, late in zip(seen[:2], seen[2:]):
        assert torch.equal(early[2], late[2]) and torch.equal(early[3], late[3])


def test_bfloat16_stays_close_to_float32():
    z, tokens = latents(dtype=torch.float32), one_chunk()
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        dit = toy_dit(torch.float32).to(dtype)
        with torch.no_grad():
            outs.append(ask(dit, z, tokens, torch.full((1, 2), 0.9), dit.text(toy_prompts(1)), Full(tokens, DIMS.head_dim)))
    assert outs[1].dtype == torch.bfloat16
    assert (outs[0] - outs[1].float()).norm() / outs[0].norm() < 0.03


def test_autocast_trains_float32_weights():
    dit, z, tokens = toy_dit(torch.float32), latents(1, 4, torch.float32), one_chunk(1, 4, 2)
    z = z.repeat(1, 2, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        out = ask(dit, z, tokens, torch.rand(1, 8), dit.text(toy_prompts(1)), TeacherForced(tokens, DIMS.head_dim))
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dit.parameters())


def test_blocks_compile_into_one_graph_that_later_steps_reuse():
    import torch._dynamo.utils as dynamo

    torch._dynamo.reset()
    dynamo.counters.clear()
    dit, z = toy_dit(), latents(2, 4).repeat(1, 2, 1, 1, 1)
    tokens, sigma = one_chunk(2, 4, 2), torch.rand(2, 8)
    want = ask(dit, z, tokens, sigma, dit.text(toy_prompts(2)), TeacherForced(tokens, DIMS.head_dim))
    for block in dit.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(3):
        got = ask(dit, z, tokens, sigma, dit.text(toy_prompts(2)), TeacherForced(tokens, DIMS.head_dim))
    assert torch.allclose(got, want, atol=1e-12)
    assert dynamo.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kernel", sorted(set(KERNELS) - {"ordered", "fp8"}))
@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_attention_kernels_agree(kernel, masked):
    q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 7, 7))
    seen = torch.rand(2, 1, 5, 7) < 0.7
    seen[..., 0] = True
    bias = {"none": None, "bool": seen, "float": torch.where(seen, 0.3, -torch.inf)}[masked]
    assert torch.allclose(attention(q, k, v, bias, kernel=kernel), attention(q, k, v, bias, kernel="math"), atol=1e-5)
