"""Who sees whom, as one rule on the tokens' metadata: the oracle that every dense attention plan is tested against.

The rule: a query sees the clean keys of earlier chunks, and the keys of its own copy of its own chunk. Teacher forcing, the
chunk-causal sequence and any interleaved layout are this rule on other metadata. Real code never builds the mask.

Legend: B batch, F frames, N tokens, C chunks, P visible chunks.
"""

from __future__ import annotations

import torch

from ..core.tokens import Tokens


def copy_index(chunk_F: list[int], noisy_F: list[bool]) -> list[int]:
    """Number of the copy of the film that each frame belongs to: a new one starts where the chunks restart or the noisy flag turns."""
    copies, current = [], 0
    for i, (chunk, noisy) in enumerate(zip(chunk_F, noisy_F)):
        if i and (chunk < chunk_F[i - 1] or noisy != noisy_F[i - 1]):
            current += 1
        copies.append(current)
    return copies


def dense_mask(tokens: Tokens, visible_BCP: torch.Tensor | None = None, committed_BCP: torch.Tensor | None = None) -> torch.Tensor:
    """Bool [B or 1, 1, N, N], True where the query (row) sees the key (column).

    `visible_BCP`: the clean chunks that each chunk's noisy copies see (-1 = none) instead of all earlier ones; `committed_BCP` the
    same for the clean copy itself (None: as `visible_BCP`).
    """
    chunk = tokens.chunk_F
    noisy = tokens.noisy_F
    copy = torch.tensor(copy_index(chunk.tolist(), noisy.tolist()), device=chunk.device)
    own = (chunk[:, None] == chunk[None, :]) & (copy[:, None] == copy[None, :])
    earlier = (chunk[None, :] < chunk[:, None])[None]
    if visible_BCP is not None:
        sees = _sees(visible_BCP.to(chunk.device), int(chunk.max()) + 1)[:, chunk][:, :, chunk]
        if committed_BCP is not None:
            clean_sees = _sees(committed_BCP.to(chunk.device), int(chunk.max()) + 1)[:, chunk][:, :, chunk]
            sees = torch.where(noisy[None, :, None], sees, clean_sees)
        earlier = earlier & sees
    mask_BFF = own[None] | (earlier & ~noisy[None, None, :])
    s = tokens.frame_tokens
    return mask_BFF.repeat_interleave(s, 1).repeat_interleave(s, 2).unsqueeze(1)


def _sees(visible_BCP: torch.Tensor, chunks: int) -> torch.Tensor:
    """Bool [B, C, C] from the list of visible chunks."""
    return (visible_BCP.unsqueeze(-1) == torch.arange(chunks, device=visible_BCP.device)).any(2)
