"""The transformer and its rollout on a GPU: half precision stays close to float32 on a CPU, compiled equals eager, nothing waits for the host."""

import pytest
import torch

from longlive.cache.attend import Cached, TeacherForced, visible_tensor
from longlive.core.tokens import Tokens
from longlive.engine.rollout import Rollout, RolloutSettings, chunk_noise
from longlive.models.patch import patchify
from longlive.models.spec import DiTDims
from longlive.models.wan_dit import WanDiT
from longlive.ops.attention import attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DIMS = DiTDims(dim=256, ffn=512, layers=2, heads=4, text_dim=16, text_len=24, channels=8)
FRAMES, ROWS, COLUMNS, CHUNKS = 4, 4, 5, 5
CUTS = [[c == 2 for c in range(CHUNKS)], [c == 3 for c in range(CHUNKS)]]
PROMPTS = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (3, 0, 24)]


def model(device, dtype):
    dit = WanDiT(DIMS)
    generator = torch.Generator().manual_seed(0)
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.06, generator=generator)
    return dit.to(device, dtype)


def apart(a, b):
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a - b).norm() / b.norm()).item()


def film(device, dtype, **settings):
    options = {"chunk_frames": FRAMES, "window_frames": 3 * FRAMES, "sink_frames": FRAMES} | settings
    dit = model(device, dtype)
    rollout = Rollout(dit, RolloutSettings(**options), token_height=ROWS, token_width=COLUMNS, batch=2, device=device, dtype=dtype)
    with torch.no_grad():
        text = dit.text(PROMPTS)
    out = []
    for chunk in range(CHUNKS):
        noise = torch.stack([chunk_noise(0, b, 0, chunk, (FRAMES, 8, 2 * ROWS, 2 * COLUMNS)) for b in range(2)])
        out.append(rollout.step(noise, text, [0, 2], [cuts[chunk] for cuts in CUTS], negative=1))
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("settings", [{}, {"recache": True}, {"relative": True}, {"guidance": 3.0}], ids=str)
def test_rollout(settings):
    truth = film("cpu", torch.float32, **settings)
    assert apart(film("cuda", torch.float32, **settings), truth) < 1e-4
    assert apart(film("cuda", torch.bfloat16, **settings), truth) < 0.05


def sequence(device, dtype):
    generator = torch.Generator().manual_seed(1)
    frames = CHUNKS * FRAMES
    tokens = Tokens(
        torch.arange(frames, dtype=torch.float64).repeat(2, 3).to(device),
        (torch.arange(frames) // FRAMES).repeat(3),
        torch.arange(3 * frames) >= frames,
        torch.randint(3, (2, 3 * CHUNKS), generator=generator).to(device),
        ROWS,
        COLUMNS,
    )
    x = patchify(torch.randn(2, 3 * frames, 8, 2 * ROWS, 2 * COLUMNS, generator=generator)).to(device, dtype)
    return tokens, x, torch.rand(2, 3 * frames, generator=generator).to(device)


@pytest.mark.parametrize("compiled", [False, True])
def test_teacher_forcing_and_its_gradients(compiled):
    policy = RolloutSettings(chunk_frames=FRAMES, window_frames=3 * FRAMES, sink_frames=FRAMES, recache=True).policy
    visible, committed = visible_tensor(CUTS, policy), visible_tensor(CUTS, policy, commit=True)
    results = []
    for device in ("cpu", "cuda"):
        dit = model(device, torch.float32)
        tokens, x, sigma = sequence(device, torch.float32)
        if compiled and device == "cuda":
            for block in dit.blocks:
                block.compile()
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            out = dit(x, tokens, sigma, dit.text(PROMPTS), TeacherForced(tokens, DIMS.head_dim, visible, committed_BCP=committed))
        (out.float() * x.cos()).sum().backward()
        results.append([out, *(dict(dit.named_parameters())[n].grad for n in ("blocks.0.self_attn.k.weight", "text_embedding.0.weight"))])
    for mine, truth in zip(results[1], results[0]):
        assert apart(mine, truth) < 0.03


def test_forwards_do_not_wait_for_the_host():
    dit = model("cuda", torch.bfloat16)
    settings = RolloutSettings(chunk_frames=FRAMES, window_frames=3 * FRAMES, sink_frames=FRAMES)
    rollout = Rollout(dit, settings, token_height=ROWS, token_width=COLUMNS, batch=2, device="cuda", dtype=torch.bfloat16)
    tokens, x, sigma = sequence("cuda", torch.bfloat16)
    part = Tokens(tokens.position_BF[:, :FRAMES], tokens.chunk_F[:FRAMES], tokens.noisy_F[:FRAMES], tokens.prompt_BG[:, :1], ROWS, COLUMNS)
    with torch.no_grad():
        text = dit.text(PROMPTS)
        windows = [settings.policy.open(w, 0) for w in rollout.state.windows]
        runs = [
            (x[:, : FRAMES * ROWS * COLUMNS], part, sigma[:, :FRAMES], Cached(rollout.stores[0], windows, 0, part, DIMS.head_dim)),
            (x, tokens, sigma, TeacherForced(tokens, DIMS.head_dim)),
        ]
        for until in ("velocity", "kv"):
            for x_BNc, toks, level, attend in runs:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    dit(x_BNc, toks, level, text, attend, until)
                finally:
                    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_agree_in_half_precision(head_dim):
    q, k, v = (torch.randn(2, n, 4, head_dim, device="cuda", dtype=torch.bfloat16) for n in (480, 1440, 1440))
    truth = attention(q, k, v, kernel="math")
    for kernel in ("sdpa", "ordered", "auto"):
        assert apart(attention(q, k, v, kernel=kernel), truth) < 0.01
    seen = torch.rand(2, 1, 1, 1440, device="cuda") < 0.5
    assert apart(attention(q, k, v, seen), attention(q, k, v, seen, kernel="math")) < 0.01
