"""LoRA on a network: live weights, stacks, gradients, and what training asks of it."""

import copy

import pytest
import torch
from dit_toys import DIMS, film, toy_dit, toy_noise, toy_prompts, toy_rollout
from lora_toys import SPEC, toy_adapter, velocity
from torch.utils.checkpoint import checkpoint

from longlive.core.errors import CheckpointError, InputError
from longlive.models.lora import LoraStack, adapter_of, adapter_state, add, attach, load_adapter_state, lora_layers, train_only
from longlive.models.lora_merge import merge_weight


def by_hand(*adapters):
    """The toy transformer with (adapter, weight) pairs put into its weights, in float64."""
    dit = toy_dit()
    for adapter, weight in adapters:
        for name, layer in adapter.layers.items():
            dit.get_submodule(name).weight.data += weight * layer.alpha / layer.rank * layer.b_OR @ layer.a_RI
    return dit


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-10, "atol": 1e-10, **tolerance})


@torch.no_grad()
def test_a_live_adapter_is_its_matrices_in_the_weights():
    dit, adapter = toy_dit(), toy_adapter()
    names = set(dit.state_dict())
    add(dit, SPEC, adapter)
    assert len(adapter.layers) == 10 * DIMS.layers and names < set(dit.state_dict())
    close(velocity(dit), velocity(by_hand((adapter, 1.0))))
    assert (velocity(dit) - velocity(toy_dit())).abs().max() > 0.01


@torch.no_grad()
def test_weight_zero_and_switched_off_are_the_network_itself_bit_for_bit():
    dit = toy_dit(torch.bfloat16)
    plain = velocity(dit)
    adapter = toy_adapter(dtype=torch.float32)
    adapter.layers["blocks.0.ffn.0"].b_OR[0, 0] = torch.inf  # 0 x inf would show
    add(dit, SPEC, adapter, weight=0.0)
    stack = LoraStack(dit)
    assert torch.equal(velocity(dit), plain)
    stack.set_weight("toy", 1.0)
    with stack.off():
        assert torch.equal(velocity(dit), plain)
    assert not torch.equal(velocity(dit), plain)
    stack.enable("toy", False)
    assert torch.equal(velocity(dit), plain) and stack.weights == {"toy": 1.0}


@torch.no_grad()
def test_a_stack_of_adapters_adds_up_with_its_weights():
    dit, few, style = toy_dit(), toy_adapter("few", seed=1), toy_adapter("style", rank=2, seed=2, only="cross_attn")
    add(dit, SPEC, few)
    add(dit, SPEC, style, weight=0.5)
    stack = LoraStack(dit)
    assert stack.weights == {"few": 1.0, "style": 0.5}
    close(velocity(dit), velocity(by_hand((few, 1.0), (style, 0.5))))
    stack.set_weight("few", -0.25)
    close(velocity(dit), velocity(by_hand((few, -0.25), (style, 0.5))))
    stack.enable("few", on=False)
    close(velocity(dit), velocity(by_hand((style, 0.5))))


@torch.no_grad()
def test_a_weight_that_changes_between_chunks_reaches_the_kept_keys_and_values_of_the_text():
    """The text context keeps each layer's keys and values; they must not survive a change of the weight that made them."""
    dit, adapter = toy_dit(), toy_adapter(only="cross_attn")
    add(dit, SPEC, adapter, weight=0.0)
    text = dit.text([prompt.double() for prompt in toy_prompts(1)])
    velocity(dit, text)
    for weight in (1.0, 0.0, 0.375):  # exact in float32, as the scale is kept
        LoraStack(dit).set_weight("toy", weight)
        close(velocity(dit, text), velocity(by_hand((adapter, weight))))


@torch.no_grad()
def test_a_film_changes_from_the_chunk_on_where_the_weight_changes():
    def chunks(weights):
        dit = toy_dit()
        add(dit, SPEC, toy_adapter(), weight=weights[0])
        rollout, noise = toy_rollout(dit, 1), toy_noise(1, len(weights)).double()
        text = dit.text([prompt.double() for prompt in toy_prompts(1)])
        made = []
        for index, weight in enumerate(weights):
            LoraStack(dit).set_weight("toy", weight)
            made.append(rollout.step(noise[:, index], text, [0], [False]))
        return made

    plain, changed = chunks((0.0, 0.0, 0.0)), chunks((0.0, 1.0, 1.0))
    assert torch.equal(plain[0], changed[0])
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain[1:], changed[1:]))
    dit = toy_dit()
    close(torch.stack(plain, 1), film(toy_rollout(dit, 1), dit.text([p.double() for p in toy_prompts(1)]), toy_noise(1, 3).double(), [[0] * 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_adapters_keep_their_precision_on_a_bfloat16_network(dtype):
    dit, adapter = toy_dit(torch.bfloat16), toy_adapter(dtype=dtype)
    add(dit, SPEC, adapter)
    out = velocity(dit)
    assert out.dtype == torch.bfloat16
    exact = velocity(by_hand((toy_adapter(), 1.0)))
    assert (out.double() - exact).norm() / exact.norm() < 0.05


@torch.no_grad()
def test_the_scale_does_not_lose_digits_when_the_network_is_cast():
    dit = toy_dit(torch.float32)
    add(dit, SPEC, toy_adapter(dtype=torch.float32), weight=0.7)
    dit.to(torch.bfloat16).to(torch.float32)
    (factor,) = {float(b.factor) for b in dit.modules() if hasattr(b, "factor")}
    assert factor == torch.tensor(0.7 * 2.0).item()


def gradients(dit, parameters):
    loss = velocity(dit).square().sum()
    return torch.autograd.grad(loss, parameters)


def test_gradients_are_those_of_the_weights_through_the_product():
    """dA = s B^T dW, dB = s dW A^T, where dW is the gradient of the plain layer with the adapter in its weight."""
    dit, adapter = toy_dit(), toy_adapter()
    attach(dit, SPEC, rank=3, alpha=6.0, dtype=torch.float64)
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            branch = dit.get_submodule(name).lora[0]
            branch.a.copy_(layer.a_RI)
            branch.b.copy_(layer.b_OR)
    found = gradients(dit, train_only(dit, "default"))
    merged = by_hand((adapter, 1.0))
    expected = gradients(merged, [merged.get_submodule(name).weight for name in adapter.layers])
    for (name, layer), a, b, w in zip(adapter.layers.items(), found[::2], found[1::2], expected):
        close(a, 2.0 * layer.b_OR.T @ w, rtol=1e-8, atol=1e-9, msg=name)
        close(b, 2.0 * w @ layer.a_RI.T, rtol=1e-8, atol=1e-9, msg=name)


def test_recomputed_blocks_give_the_same_gradients():
    dit = toy_dit()
    attach(dit, SPEC, rank=2, dtype=torch.float64)
    for p in train_only(dit, "default"):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    straight = gradients(dit, train_only(dit, "default"))
    for block in dit.blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner, **words: checkpoint(inner, *args, use_reentrant=False, **words)
    for a, b in zip(straight, gradients(dit, train_only(dit, "default"))):
        close(a, b)


def test_training_starts_at_the_network_and_only_the_adapter_learns():
    dit = toy_dit(torch.float32)
    plain = velocity(dit).detach()
    parameters = attach(dit, SPEC, rank=4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(velocity(dit), plain)
    assert [p for p in dit.parameters() if p.requires_grad] == parameters and len(parameters) == 2 * 10 * DIMS.layers
    velocity(dit).square().sum().backward()
    assert all(p.grad is None for p in toy_named(dit, lora=False)) and all(p.grad is not None for p in parameters)
    again = attach(toy_dit(torch.bfloat16), SPEC, rank=4, generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(parameters, again))


def toy_named(dit, lora):
    return [p for name, p in dit.named_parameters() if (".lora." in name) == lora]


def test_dropout_works_in_training_only():
    dit = toy_dit(torch.float32)
    attach(dit, SPEC, rank=4, dropout=0.5)
    for p in train_only(dit, "default"):
        torch.nn.init.normal_(p, std=0.2)
    dit.eval()
    assert torch.equal(velocity(dit), velocity(dit))
    dit.train()
    assert not torch.equal(velocity(dit), velocity(dit))


def test_the_state_of_an_adapter_has_published_names_and_loads_strictly():
    dit, other = toy_dit(), toy_dit()
    attach(dit, SPEC, rank=2, generator=torch.Generator().manual_seed(1))
    attach(other, SPEC, rank=2, generator=torch.Generator().manual_seed(2))
    state = {key: tensor.detach().clone() + 0.1 for key, tensor in adapter_state(dit).items()}
    assert list(state)[:2] == ["base_model.model.blocks.0.self_attn.q.lora_A.weight", "base_model.model.blocks.0.self_attn.q.lora_B.weight"]
    load_adapter_state(other, state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter_state(other).items())
    with pytest.raises(CheckpointError, match="missing base_model.model.blocks.0.ffn.0.lora_A.weight"):
        load_adapter_state(other, {k: v for k, v in state.items() if "blocks.0.ffn.0.lora_A" not in k})
    with pytest.raises(CheckpointError, match="unexpected odd"):
        load_adapter_state(other, state | {"odd": torch.zeros(1)})
    wide = toy_dit()
    attach(wide, SPEC, rank=3)
    with pytest.raises(CheckpointError, match="wrong shape: .* is \\[2, 48\\], expected \\[3, 48\\]"):
        load_adapter_state(wide, state)


@torch.no_grad()
def test_a_copied_network_has_adapters_of_its_own():
    dit = toy_dit()
    add(dit, SPEC, toy_adapter())
    twin = copy.deepcopy(dit)
    LoraStack(dit).set_weight("toy", 0.0)
    assert torch.equal(velocity(dit), velocity(toy_dit()))
    close(velocity(twin), velocity(by_hand((toy_adapter(), 1.0))))


class OtherLinear(torch.nn.Module):
    """A Linear of another kind, as quantised ones are: no parameters, only buffers."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.data.clone())
        self.register_buffer("bias", linear.bias.data.clone())

    def forward(self, x):
        return torch.nn.functional.linear(x, self.packed, self.bias)


@torch.no_grad()
def test_any_kind_of_linear_takes_an_adapter():
    dit, adapter = toy_dit(), toy_adapter()
    for name, layer in lora_layers(dit, SPEC).items():
        parent, _, leaf = name.rpartition(".")
        setattr(dit.get_submodule(parent), leaf, OtherLinear(layer))
    add(dit, SPEC, adapter)
    close(velocity(dit), velocity(by_hand((adapter, 1.0))))


@torch.no_grad()
def test_adapter_of_gives_back_what_was_added():
    dit, adapter = toy_dit(), toy_adapter()
    add(dit, SPEC, adapter)
    found = adapter_of(dit, "toy")
    assert set(found.layers) == set(adapter.layers) and found.rank == 3 and found.alpha == 6.0
    weight = torch.randn(64, 48, dtype=torch.float64)
    name = "blocks.1.ffn.0"
    close(merge_weight(weight, [(found.layers[name], 1.0)], torch.float64), merge_weight(weight, [(adapter.layers[name], 1.0)], torch.float64))


def test_mistakes_are_said_in_one_line():
    dit = toy_dit()
    add(dit, SPEC, toy_adapter())
    with pytest.raises(InputError, match="already a LoRA called 'toy'"):
        add(dit, SPEC, toy_adapter())
    with pytest.raises(InputError, match="no LoRA called 'tony'; did you mean 'toy'"):
        LoraStack(dit).set_weight("tony", 1.0)
    with pytest.raises(InputError, match="weight nan"):
        LoraStack(dit).set_weight("toy", float("nan"))
    with pytest.raises(InputError, match="rank 0"):
        attach(dit, SPEC, rank=0, name="other")
    with pytest.raises(InputError, match="no Linear that matches"):
        attach(torch.nn.Linear(2, 2), SPEC, rank=1)
    with pytest.raises(InputError, match="to train"):
        train_only(dit, "none")
