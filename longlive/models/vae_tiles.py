"""The end of the decoder in tiles of rows, for cards with little memory: the last doubling, the last stage and the head.

Frames are whole before them, and small. Then a tile after another takes its rows and, on both sides, as many as the convolutions to come reach over. Layers do
not know: at a tile's edge they see zeros, as at the frame's, and what that spoils are rows of the neighbours, which are thrown away. A stream remembers whole
frames, as without tiles. Results are those of whole frames to rounding; in FP8 to the rounding of codes, as the doubling has a scale for each tile.

Legend: B batch, T frames, P past frames, H W rows and columns before the last doubling, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import InputError
from .codec import VideoCodec
from .wan_vae import PAST, VAEState, Walk, WholeFrame


class Tile(NamedTuple):
    """Rows start..end are its own; it reads low..high."""

    start: int
    end: int
    low: int
    high: int


def row_tiles(rows: int, size: int, reach: int) -> list[Tile]:
    """`rows` in tiles of `size` (the last one perhaps fewer), which read `reach` more on both sides where the frame has them."""
    return [Tile(at, min(rows, at + size), max(0, at - reach), min(rows, at + size + reach)) for at in range(0, rows, size)]


class RowTiles(WholeFrame):
    """Tiles of `latent_rows` rows of latents, 16 rows of pixels each. Raises InputError for fewer than 1. With gradients frames stay whole."""

    def __init__(self, latent_rows: int):
        if latent_rows < 1:
            raise InputError(f"tiles of {latent_rows} latent rows; give at least 1, or leave tiles away")
        self.latent_rows = latent_rows

    def by_rows(self, last: Callable, given: list[Tensor], walk: Walk, rows_each: int, reach: int) -> tuple[Tensor, Tensor | None]:
        rows = given[0].shape[2]
        tiles = row_tiles(rows, self.latent_rows * rows_each, reach)
        if len(tiles) == 1 or torch.is_grad_enabled():
            return last(given, walk)
        remembered, out = Remembered(walk, rows), None
        for tile, following in zip(tiles, [*tiles[1:], None]):
            parts = [x[:, :, tile.low : tile.high].contiguous() for x in given]
            y, bias = last(parts, TileWalk(walk, tile, following, remembered))
            times = y.shape[2] // (tile.high - tile.low)
            out = y.new_empty(*y.shape[:2], times * rows, *y.shape[3:]) if out is None else out
            first = times * (tile.start - tile.low)
            out[:, :, times * tile.start : times * tile.end] = y[:, :, first : first + times * (tile.end - tile.start)]
        if walk.keep:
            walk.hand_on(tuple(remembered.new))
        return out, bias


class Remembered:
    """Past frames of the layers to come: `old` before, `new` after, both of whole frames of `rows`, or of twice as many behind the doubling.

    Codes of FP8 layers have a border of one row, which stays zero. Where `new` takes the memory of `old`, rows that the next tile reads are written later.
    """

    def __init__(self, walk: Walk, rows: int):
        self.rows, self.old, self.in_place = rows, walk.to_come(), walk.reuse
        self.new: list[Tensor] = list(self.old) if walk.reuse else []
        self.later: dict[int, Tensor] = {}

    def past(self, tile: Tile) -> VAEState | None:
        """What the layers remember of the rows that the tile reads."""
        if self.old is None:
            return None
        slices = []
        for cache in self.old:
            times, both_borders = divmod(cache.shape[2], self.rows)
            slices.append(cache[:, :, times * tile.low : times * tile.high + both_borders])
        return VAEState(tuple(slices))

    def take(self, layer: int, last_BPHWC: Tensor, tile: Tile, following: Tile | None) -> None:
        """Keeps the tile's own rows of what the layer read."""
        read = tile.high - tile.low
        times, both_borders = divmod(last_BPHWC.shape[2], read)
        border, start, end = both_borders // 2, times * tile.start, times * tile.end
        if layer == len(self.new):
            shape = list(last_BPHWC.shape)
            shape[2] = times * self.rows + both_borders
            self.new.append(last_BPHWC.new_zeros(shape))
        first = border + start - times * tile.low
        own = last_BPHWC[:, :, first : first + end - start]
        if layer in self.later:
            own = torch.cat([self.later.pop(layer), own], 2)
            start = end - own.shape[2]
        ready = end if following is None or not self.in_place else max(start, times * following.low)
        self.new[layer][:, :, border + start : border + ready] = own[:, :, : ready - start]
        if ready < end:
            self.later[layer] = own[:, :, ready - start :].clone()


class TileWalk(Walk):
    """The walk of a tile: its layers remember rows of whole frames."""

    def __init__(self, walk: Walk, tile: Tile, following: Tile | None, remembered: Remembered):
        super().__init__(remembered.past(tile), keep=walk.keep, spatial=walk.spatial, pointwise=walk.pointwise)
        self.tile, self.following, self.remembered, self.layer = tile, following, remembered, 0

    def leave(self, padded_BTHWC: Tensor, frames: int = PAST) -> Tensor:
        if self.keep:
            self.remembered.take(self.layer, padded_BTHWC[:, -frames:], self.tile, self.following)
            self.layer += 1
        return padded_BTHWC


def decode_in_tiles(codec: VideoCodec, latent_rows: int) -> None:
    """The codec decodes one latent frame at a time, at the end in tiles of `latent_rows`. Raises InputError for fewer than 1."""
    codec.vae.spatial, codec.group = RowTiles(latent_rows), 1
