"""Teacher forcing over the whole history in merged parts: the plain path's numbers, and recomputed blocks that do not read twice."""

import pytest
import torch
from dit_toys import COLUMNS, DIMS, FRAMES, ROWS, ask, film_tokens, toy_dit, toy_prompts

import longlive.cache.attend as strategies
from longlive.cache.attend import PLAIN, TeacherForced
from longlive.train.compiled import checkpoint_blocks

CHUNKS = 3


def inputs(copies):
    generator = torch.Generator().manual_seed(5)
    frames = copies * CHUNKS * FRAMES
    z = torch.randn(2, frames, DIMS.channels, 2 * ROWS, 2 * COLUMNS, dtype=torch.float64, generator=generator)
    tokens = film_tokens(torch.arange(2 * CHUNKS).view(2, CHUNKS), torch.arange(CHUNKS * FRAMES).double().expand(2, -1), copies)
    return z, tokens, torch.rand(2, frames, generator=generator, dtype=torch.float64)


def step(dit, copies, attend_of):
    z, tokens, sigma = inputs(copies)
    dit.zero_grad()
    out = ask(dit, z, tokens, sigma, dit.text(toy_prompts(2 * CHUNKS)), attend_of(tokens))
    (out * z.cos()).sum().backward()
    return [out.detach(), *(p.grad.clone() for p in dit.parameters())]


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_merged_parts_equal_the_plain_path(copies):
    dit = toy_dit()
    plain = step(dit, copies, lambda tokens: TeacherForced(tokens, DIMS.head_dim, kernel=PLAIN))
    merged = step(dit, copies, lambda tokens: TeacherForced(tokens, DIMS.head_dim, kernel="math"))
    for mine, want in zip(merged, plain):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-10)


def test_a_recomputed_block_reads_once(monkeypatch):
    reads, real = [], strategies.film_attention

    def counted(*args, read=None, **options):
        reads.append(read is None)
        return real(*args, read=read, **options)

    def strategy(tokens, keep=DIMS.layers):
        made.append(TeacherForced(tokens, DIMS.head_dim, kernel="math"))
        made[-1].keep_reads = keep
        return made[-1]

    made, recomputed = [], toy_dit()
    want = step(toy_dit(), 2, strategy)
    assert len(made[0]._reads) == DIMS.layers  # nothing was recomputed
    checkpoint_blocks(recomputed.blocks)
    monkeypatch.setattr(strategies, "film_attention", counted)
    found = step(recomputed, 2, strategy)
    assert reads == [True] * DIMS.layers + [False] * DIMS.layers and not made[1]._reads
    for mine, right in zip(found, want):
        assert torch.equal(mine, right)
    reads.clear()
    step(recomputed, 2, lambda tokens: strategy(tokens, keep=1))
    assert reads == [True] * (2 * DIMS.layers - 1) + [False]  # the first layer is recomputed last


def test_windows_stay_plain():
    _, tokens, _ = inputs(2)
    window = TeacherForced(tokens, DIMS.head_dim, torch.zeros(2, CHUNKS, 1, dtype=torch.int64), kernel="math")
    relative = TeacherForced(tokens, DIMS.head_dim, relative=True, kernel="math")
    assert window.kernel == relative.kernel == PLAIN
