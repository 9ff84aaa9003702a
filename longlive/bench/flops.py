"""Operations of one training step, by arithmetic: what the mathematics needs, not what an implementation executes.

A multiplication with an addition counts 2. Only visible pairs of queries and keys count. The backward counts twice the forward, so a step is three
forwards; recomputed activations, optimizer, VAE, text encoder, norms and other elementwise work count nothing (docs/performance.md).

Legend: D model features, ffn features between the two linear layers, M text keys of a prompt, C latent channels.
"""

from __future__ import annotations

from ..models.spec import DiTDims

FORWARDS = 3  # of a step: forward, and a backward of twice its operations
ATTENTION_BACKWARD = 2.5  # forwards of attention alone whose weights are computed again from q, k and log-sum-exp: 5 products for 2


def visible_pairs(chunks: int, chunk_tokens: int, *, copies: int = 1, pages: int | None = None) -> int:
    """Query-key pairs of teacher forcing on [clean; noisy x copies]: chunk c of any stream reads min(c + 1, `pages`) chunks, its own included."""
    read = sum(c + 1 if pages is None else min(c + 1, pages) for c in range(chunks))
    return (1 + copies) * read * chunk_tokens**2


def training_flops(
    frames: int, dims: DiTDims, *, chunk_frames: int, frame_tokens: int, text_keys: int, copies: int = 1, pages: int | None = None
) -> float:
    """Operations of one step on one sample of `frames` latent frames with one prompt of `text_keys` keys per chunk; `pages` as in `visible_pairs`."""
    chunks, d = frames // chunk_frames, dims.dim
    tokens, words = (1 + copies) * frames * frame_tokens, chunks * text_keys
    pairs = visible_pairs(chunks, chunk_frames * frame_tokens, copies=copies, pages=pages)
    linear = 2 * tokens * (6 * d**2 + 2 * d * dims.ffn) + 2 * words * 2 * d**2  # q, k, v, o, cross q, cross o, ffn; cross k, v
    attention = 4 * d * (pairs + tokens * text_keys)
    patches = 4 * dims.channels * d
    embeddings = 2 * tokens * patches + 2 * words * (dims.text_dim * d + d**2) + 2 * (1 + copies) * frames * (dims.freq_dim * d + 7 * d**2)
    head = 2 * copies * frames * frame_tokens * patches
    return FORWARDS * float(dims.layers * (linear + attention) + embeddings + head)


def attention_flops(pairs: int, heads: int, head_dim: int, *, backward: bool) -> float:
    """Operations of attention over `pairs` visible pairs: 4 per pair and feature forward, 3.5 times as much with the backward."""
    return 4.0 * pairs * heads * head_dim * (1 + ATTENTION_BACKWARD * backward)


def utilisation(flops: float, seconds: float, devices: int, peak: float) -> float:
    """Share of `peak` operations a second that `devices` cards reached together."""
    return flops / (seconds * devices * peak)
