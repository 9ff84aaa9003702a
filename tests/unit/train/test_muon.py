"""Muon: the same numbers as torch's, matrix by matrix; who is a matrix; one state for both optimisers."""

import copy

import torch
from torch import nn

from longlive.train.muon import COEFFICIENTS, STEPS, Both, Muon, muon, orthogonalised


def _block() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    sizes = {"a": (32, 32), "b": (32, 64), "c": (64, 32), "gate": (4, 32)}
    module.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(2)])
    module.head = nn.Linear(32, 8)
    return module


def _gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_updates_equal_torchs():
    ours = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate([(32, 32), (32, 32), (32, 64), (64, 32)])]
    theirs = copy.deepcopy(ours)
    a = Muon(ours, lr=1e-2, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(100 + step))
            y.grad = x.grad.clone()
        a.step(), b.step()
    for x, y in zip(ours, theirs):
        assert (x - y).abs().max() < 2e-3 * y.abs().max()


def test_an_update_has_singular_values_near_one():
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(1))).float())
    assert singular.min() > 0.5 and singular.max() < 1.3


def test_a_cpu_makes_updates_orthogonal_in_float32():
    update = torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(1))
    exact = update.double() / update.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(STEPS):
        gram = exact @ exact.mT
        exact = COEFFICIENTS[0] * exact + (COEFFICIENTS[1] * gram + COEFFICIENTS[2] * gram @ gram) @ exact
    assert (orthogonalised(update) - exact).abs().max() < 1e-5


def test_matrices_of_blocks_go_to_muon_and_all_else_to_adamw():
    module = _block()
    both = muon(module, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    assert isinstance(both, Both)
    matrices = {id(p) for p in both.optimizers[0].param_groups[0]["params"]}
    names = [name for name, p in module.named_parameters() if id(p) in matrices]
    assert len(names) == 6 and all(name.split(".")[2] in "abc" and name.endswith("weight") for name in names)
    assert sum(len(g["params"]) for g in both.param_groups) == len(list(module.parameters()))


def test_a_restored_state_takes_the_same_next_step():
    module = _block()
    both = muon(module, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    _gradients(module, 0)
    both.step()
    other = copy.deepcopy(module)
    again = muon(other, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    again.load_state_dict(copy.deepcopy(both.state_dict()))
    for m, o in ((module, both), (other, again)):
        _gradients(m, 1)
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), other.parameters()))


def test_a_module_without_blocks_is_trained_by_adamw():
    assert isinstance(muon(nn.Linear(32, 32), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0), torch.optim.AdamW)
