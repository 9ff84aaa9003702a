"""The Wan2.2 video VAE: pixels <-> latents, 16x smaller on each side and 4x shorter in time.

The one idea: every layer looks only backwards in time, so a whole clip in one call equals the same clip frame by frame, as long as each temporal
layer is handed the last frames that it saw. Those frames are the explicit `VAEState`; the modules hold none. "Before the stream" is zeros, so a fresh
start is ordinary zero padding; only the layers that change the frame rate treat the very first frame apart (spec inference §5.2, §5.4).

Legend: B batch, T frames at this depth, F latent frames, H W rows and columns at this depth, C channels innermost. Inside the network activations are
x_BTHWC: norms read contiguous channels and convolutions run channels-last without a copy. Key names are those of the published file (spec §5.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import InputError
from ..core.geometry import TEMPORAL_STRIDE, latent_frames
from ..ops import conv_doubling, conv_narrow
from ..ops.frame_attention import frame_attention
from ..ops.frames import (
    PATCH, Beside, adds_bias, from_patches, interleave, norm_silu, paired, patches_to_bytes, plain_cpu, residual_add, rms, to_patches,
)  # fmt: skip
from .spec import VAEDims

PAST = 2
VECTOR = 8
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # of convolution kernels, by dimensions


class VAEState(NamedTuple):
    """What a stream must remember: per temporal layer, in the order of execution, the last frames it saw (x_BPHWC).

    A pytree of tensors of the activations' dtype; one state belongs to the encoder or to the decoder, never to both.
    """

    caches: tuple[Tensor, ...]

    def clone(self) -> "VAEState":
        return VAEState(tuple(cache.clone() for cache in self.caches))


class WholeFrame:
    """Where the rows of a frame are: here, all of them. Other strategies (row tiles, row shards with halo) replace this object.

    `convolve` supplies the rows and columns outside the frame that a convolution reads and hands `options` on to its kernel; `gather` and `own` bracket
    work that needs whole frames. `by_rows` does the end of the decoder. `whole`: every row is here.
    """

    whole = True

    def convolve(self, conv: "Conv", x_BTHWC: Tensor, **options) -> Tensor:
        top, bottom, left, right = conv.border
        if (top, left) != (bottom, right):
            x_BTHWC, top, left = F.pad(x_BTHWC, (0, 0, left, right, top, bottom)), 0, 0
        return conv.kernel(x_BTHWC, (top, left), **options)

    def gather(self, x_BTHWC: Tensor) -> Tensor:
        return x_BTHWC

    def own(self, x_BTHWC: Tensor) -> Tensor:
        return x_BTHWC

    def by_rows(self, last: Callable, given: list[Tensor], walk: "Walk", rows_each: int, reach: int) -> tuple[Tensor, Tensor | None]:
        """`last(given, walk)`, whose convolutions reach over `reach` rows of what is given; a row of latents is `rows_each` of them."""
        return last(given, walk)


WHOLE_FRAME = WholeFrame()


class Walk:
    """One pass over a piece of a stream: hands each temporal layer what the piece before left, and collects what this one leaves.

    `first` is True at the start of a stream. `keep` False leaves nothing (whole clips, training). `reuse` writes what is left into the memory of `state`.
    """

    def __init__(self, state: VAEState | None, *, keep: bool, spatial: WholeFrame, pointwise: Callable, reuse: bool = False):
        self.first, self.spatial, self.pointwise, self.keep, self.reuse = state is None, spatial, pointwise, keep, reuse and state is not None
        self._given, self._left, self._at = state, [] if keep else None, 0

    def past(self, x_BTHWC: Tensor, frames: int = PAST) -> Tensor:
        """The `frames` inputs that this layer saw before x; zeros at the start of a stream."""
        B, _, H, W, C = x_BTHWC.shape
        return self.before(lambda: x_BTHWC.new_zeros(B, frames, H, W, C))

    def before(self, empty: Callable[[], Tensor]) -> Tensor:
        """What this layer left in the piece before; `empty()` at the start of a stream."""
        if self._given is None:
            return empty()
        self._at += 1
        return self._given.caches[self._at - 1]

    def leave(self, padded_BTHWC: Tensor, frames: int = PAST) -> Tensor:
        """Keeps the last `frames` of what the layer read, as a copy (a view would hold the whole activation). Its past has been read by now."""
        if self._left is not None:
            last = padded_BTHWC[:, -frames:]
            self._left.append(self._given.caches[self._at - 1].copy_(last) if self.reuse else last.clone())
        return padded_BTHWC

    def extend(self, x_BTHWC: Tensor) -> Tensor:
        return self.leave(torch.cat([self.past(x_BTHWC), x_BTHWC], 1))

    def activate(self, x_BTHWC: Tensor, gamma: Tensor, bias: Tensor | None = None) -> Tensor:
        """norm and SiLU of x + bias, and the past of a 3-frame convolution, in one step."""
        if bias is None:
            return self.leave(self.pointwise(x_BTHWC, gamma, self.past(x_BTHWC)))
        return self.leave(self.pointwise(x_BTHWC, gamma, self.past(x_BTHWC), bias))

    def state(self) -> VAEState | None:
        return None if self._left is None else VAEState(tuple(self._left))

    def to_come(self) -> tuple[Tensor, ...] | None:
        """What the layers to come left in the piece before; None at the start of a stream."""
        return None if self._given is None else self._given.caches[self._at :]

    def hand_on(self, caches: tuple[Tensor, ...]) -> None:
        """`caches` are what the layers to come leave."""
        self._left.extend(caches)


class Conv(nn.Module):
    """The only convolution of the VAE. `kernel_size` (k,k) works per frame, (t,k,k) over time without padding there (the caller adds the past).

    `border` is (top, bottom, left, right) zero padding in space. Other number formats replace `kernel`, other layouts the `Spatial` strategy.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel_size: tuple[int, ...], *, stride: tuple[int, ...] | None = None, border: tuple[int, ...] | None = None
    ):
        super().__init__()
        pad = kernel_size[-1] // 2
        self.stride, self.border = stride or (1,) * len(kernel_size), border or (pad,) * 4
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel_size))
        self.bias = nn.Parameter(torch.empty(outputs))
        self._kept: tuple[tuple, Tensor] | None = None
        self.reset_parameters()

    @property
    def sizes(self) -> tuple[int, ...]:
        """(outputs, inputs, *kernel size)"""
        return tuple(self.weight.shape)

    def reset_parameters(self) -> None:
        """torch's convolution default: uniform within 1/sqrt(fan_in)."""
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        return walk.spatial.convolve(self, x_BTHWC)

    def apart(self, x_BTHWC: Tensor, walk: Walk) -> tuple[Tensor, Tensor | None]:
        """(the convolution without its bias, the bias) where the next step adds it for nothing; (the convolution, None) elsewhere."""
        if not adds_bias(x_BTHWC, self.weight):
            return self(x_BTHWC, walk), None
        return walk.spatial.convolve(self, x_BTHWC, bias=False), self.bias

    def activated(self, x_BTHWC: Tensor, gamma: Tensor, walk: Walk, bias: Tensor | None = None) -> Tensor:
        """What `apart` and `summed` convolve: the SiLU of the norm of x + bias, behind its past. A step of its own, after which x may go."""
        return walk.activate(x_BTHWC, gamma, bias)

    def summed(self, x_BTHWC: Tensor, walk: Walk, beside_BTHWC: Tensor) -> Tensor:
        """The convolution of x plus `beside`."""
        y, own = self.apart(x_BTHWC, walk)
        return residual_add(y, beside_BTHWC, own)

    def kernel(self, x_BTHWC: Tensor, pad: tuple[int, int], *, bias: bool = True) -> Tensor:
        """The bare convolution with symmetric zero padding `pad` = (rows, columns)."""
        if not bias and conv_narrow.fits(x_BTHWC, self.weight, self.stride, pad):
            rows = self._made("columns", lambda: conv_narrow.tap_rows(self.weight))
            return conv_narrow.convolution(x_BTHWC, rows, len(self.weight), pad[0])
        added, weight = (self.bias, self.weight) if bias else (None, self._whole_vectors())
        if weight[0, 0].numel() == 1:
            y = F.linear(x_BTHWC, weight.flatten(1), added)
        elif weight.dim() == 5:
            y = convolution(x_BTHWC.permute(0, 4, 1, 2, 3), weight, added, self.stride, (0, *pad)).permute(0, 2, 3, 4, 1)
        else:
            frames = x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)
            y = convolution(frames, weight, added, self.stride, pad).permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])
        return y if len(weight) == len(self.weight) else y[..., : len(self.weight)]

    def _whole_vectors(self) -> Tensor:
        """The weight with outputs filled up to a multiple of `VECTOR`, as tensor cores want them; the head's 12 are not."""
        if len(self.weight) % VECTOR == 0:
            return self.weight
        more = -len(self.weight) % VECTOR
        return self._made("whole", lambda: torch.cat([self.weight, self.weight.new_zeros(more, *self.weight.shape[1:])]))

    def _made(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What was made of the weight, kept channels-last for as long as the weight is the same. Made each time where gradients or a compiler want it so."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.weight.is_inference():
            return make()
        stamp = (name, self.weight.data_ptr(), self.weight._version, self.weight.dtype)
        if self._kept is None or self._kept[0] != stamp:
            made = make()
            self._kept = stamp, made.contiguous(memory_format=FORMATS.get(made.dim(), torch.contiguous_format))
        return self._kept[1]


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """conv2d or conv3d by the weight's dimensions, channels-last in and out."""
    if plain_cpu(x) and torch.backends.mkldnn.is_available() and x.dtype == weight.dtype == torch.float32:
        # torch sends small inputs to a convolution ten times slower than this one
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1,) * len(stride), 1)
    return (F.conv3d if weight.dim() == 5 else F.conv2d)(x, weight, bias, stride, padding)


class DoublingConv(Conv):
    """Each pixel doubled in both directions, then a 3x3 convolution: done on the small grid, 4 taps instead of 9 (`ops.conv_doubling`)."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, (3, 3))

    def phases(self) -> Tensor:
        """[4 O, I, 2, 2]: one 2x2 convolution computes the four phases."""
        return conv_doubling.phases(self.weight)

    def kernel(self, x_BTHWC: Tensor, pad: tuple[int, int], *, beside: Beside | None = None) -> Tensor:
        """Plus the doubled `beside`."""
        if conv_doubling.fits(x_BTHWC, self.weight, pad, beside):
            return conv_doubling.doubled(x_BTHWC, self._made("taps", lambda: conv_doubling.tap_rows(self.phases())), self.bias, beside)
        apart = adds_bias(x_BTHWC, self.weight)
        bias = None if apart else self.bias.repeat(4)
        y = convolution(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2), self._made("phases", self.phases), bias, (1, 1), pad).permute(0, 2, 3, 1)
        return interleave(y.unflatten(-1, (2, 2, -1)), x_BTHWC.shape[1], beside, self.bias if apart else None)


class Norm(nn.Module):
    """Holds gamma [C,1,1,(1)] of the channel norm; the arithmetic is `rms`."""

    def __init__(self, channels: int, dims: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))


class Residual(nn.Module):
    """norm, SiLU, 3x3x3, norm, SiLU, 3x3x3, plus the input (through a 1x1x1 convolution where the width changes)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        first, second = Conv(inputs, outputs, (3, 3, 3)), Conv(outputs, outputs, (3, 3, 3))
        self.residual = nn.ModuleDict({"0": Norm(inputs), "2": first, "3": Norm(outputs), "6": second})
        self.shortcut = Conv(inputs, outputs, (1, 1, 1)) if inputs != outputs else None

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        first, second = self.residual["2"], self.residual["6"]
        y, bias = first.apart(first.activated(x_BTHWC, self.residual["0"].gamma, walk), walk)
        beside = x_BTHWC if self.shortcut is None else self.shortcut(x_BTHWC, walk)
        activated = second.activated(y, self.residual["3"].gamma, walk, bias)
        del y  # before the convolution takes as much memory
        return second.summed(activated, walk, beside)


class FrameAttention(nn.Module):
    """Single-head attention among all positions of one frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.to_qkv, self.proj = Norm(channels, 2), Conv(channels, 3 * channels, (1, 1)), Conv(channels, channels, (1, 1))

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        with torch.autocast(x_BTHWC.device.type, enabled=False):
            normed = rms(x_BTHWC, self.norm.gamma)
        whole = walk.spatial.gather(self.to_qkv(normed, walk))
        y = frame_attention(*whole.flatten(2, 3).flatten(0, 1).chunk(3, -1))
        y = walk.spatial.own(y.view(*whole.shape[:4], -1))
        return x_BTHWC + self.proj(y, walk)


class Downsample(nn.Module):
    """Half the rows and columns; with `temporal` then half the frames, the stream's first frame kept as it is."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv(channels, channels, (3, 3), stride=(2, 2), border=(0, 1, 0, 1))})
        self.time_conv = Conv(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        x_BTHWC = self.resample["1"](x_BTHWC, walk)
        if self.time_conv is None:
            return x_BTHWC
        if not walk.first:
            return self.time_conv(walk.leave(torch.cat([walk.past(x_BTHWC, 1), x_BTHWC], 1), 1), walk)
        walk.leave(x_BTHWC, 1)
        if x_BTHWC.shape[1] == 1:
            return x_BTHWC
        return torch.cat([x_BTHWC[:, :1], self.time_conv(x_BTHWC, walk)], 1)


class Upsample(nn.Module):
    """With `temporal` twice the frames, the stream's first frame kept single; then each pixel doubled in both directions and a 3x3 convolution.

    `beside` is doubled without parameters and added.
    """

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": DoublingConv(channels)})
        self.time_conv = Conv(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x_BTHWC: Tensor, walk: Walk, beside_BTHWC: Tensor) -> Tensor:
        beside = Beside(beside_BTHWC, 1 if self.time_conv is None else 2, walk.first)
        if self.time_conv is not None:
            x_BTHWC = self._double_frames(x_BTHWC, walk)
        return walk.spatial.convolve(self.resample["1"], x_BTHWC, beside=beside)

    def _double_frames(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        # The stream's first frame never enters time_conv, neither as input nor as past.
        head, x_BTHWC = x_BTHWC[:, : int(walk.first)], x_BTHWC[:, int(walk.first) :]
        past = walk.leave(torch.cat([walk.past(x_BTHWC), x_BTHWC], 1))
        if x_BTHWC.shape[1] == 0:
            return head
        pairs = paired(*self.time_conv.apart(past, walk))
        return torch.cat([head, pairs], 1) if walk.first else pairs


def average_down(x_BTHWC: Tensor, outputs: int, time: int, space: int) -> Tensor:
    """Parameter-free shortcut of the encoder: blocks of time x space x space become channels (c, i, j, k), averaged in groups down to `outputs`."""
    B, T, H, W, C = x_BTHWC.shape
    if T % time:
        x_BTHWC = F.pad(x_BTHWC, (0, 0, 0, 0, 0, 0, time - T % time, 0))
    blocks = x_BTHWC.reshape(B, -1, time, H // space, space, W // space, space, C)
    flat = blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, -1, H // space, W // space, C * time * space * space)
    return flat.unflatten(-1, (outputs, -1)).mean(-1)


class DownStage(nn.Module):
    """Residual blocks, then a Downsample (except in the last stage), plus the averaged input."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, temporal: bool, last: bool):
        super().__init__()
        layers = [Residual(inputs if i == 0 else outputs, outputs) for i in range(blocks)]
        self.downsamples = nn.ModuleList(layers if last else [*layers, Downsample(outputs, temporal)])
        self.shape = (outputs, 2 if temporal else 1, 1 if last else 2)

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        y = x_BTHWC
        for layer in self.downsamples:
            y = layer(y, walk)
        return y + average_down(x_BTHWC, *self.shape)


class UpStage(nn.Module):
    """Residual blocks, then an Upsample and the duplicated input (except in the last stage)."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, temporal: bool, last: bool):
        super().__init__()
        layers = [Residual(inputs if i == 0 else outputs, outputs) for i in range(blocks)]
        self.upsamples = nn.ModuleList(layers if last else [*layers, Upsample(outputs, temporal)])

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        return self.double(self.blocks(x_BTHWC, walk), x_BTHWC, walk)

    def blocks(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        for layer in self.upsamples:
            if isinstance(layer, Residual):
                x_BTHWC = layer(x_BTHWC, walk)
        return x_BTHWC

    def double(self, x_BTHWC: Tensor, beside_BTHWC: Tensor, walk: Walk) -> Tensor:
        last = self.upsamples[-1]
        return last(x_BTHWC, walk, beside_BTHWC) if isinstance(last, Upsample) else x_BTHWC


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([Residual(channels, channels), FrameAttention(channels), Residual(channels, channels)])


def _head(channels: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": Norm(channels), "2": Conv(channels, outputs, (3, 3, 3))})


class Encoder(nn.Module):
    """[B, T, H/2, W/2, 12] patches -> [B, F, H/16, W/16, 2 z] moments before the last 1x1x1."""

    def __init__(self, dims: VAEDims):
        super().__init__()
        widths = [dims.encoder_base * m for m in (1, *dims.multipliers)]
        self.conv1 = Conv(3 * PATCH * PATCH, widths[0], (3, 3, 3))
        temporal = (*dims.temporal_down, False)
        self.downsamples = nn.ModuleList(
            DownStage(widths[i], widths[i + 1], dims.encoder_blocks, temporal=temporal[i], last=i == len(widths) - 2) for i in range(len(widths) - 1)
        )
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], 2 * dims.z_dim)

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        x_BTHWC = self.conv1(walk.extend(x_BTHWC), walk)
        for layer in (*self.downsamples, *self.middle):
            x_BTHWC = layer(x_BTHWC, walk)
        return self.head["2"](walk.activate(x_BTHWC, self.head["0"].gamma), walk)


class Decoder(nn.Module):
    """[B, F, h, w, z] -> [B, T, 8h, 8w, 12] patches, and the bias that they lack (None: they lack none)."""

    def __init__(self, dims: VAEDims):
        super().__init__()
        widths = [dims.decoder_base * m for m in (dims.multipliers[-1], *dims.multipliers[::-1])]
        self.conv1 = Conv(dims.z_dim, widths[0], (3, 3, 3))
        self.middle = _middle(widths[0])
        temporal = (*dims.temporal_down[::-1], False)
        self.upsamples = nn.ModuleList(
            UpStage(widths[i], widths[i + 1], dims.decoder_blocks, temporal=temporal[i], last=i == len(widths) - 2) for i in range(len(widths) - 1)
        )
        self.head = _head(widths[-1], 3 * PATCH * PATCH)

    def forward(self, z_BFHWC: Tensor, walk: Walk) -> tuple[Tensor, Tensor | None]:
        x_BTHWC = self.conv1(walk.extend(z_BFHWC), walk)
        for layer in (*self.middle, *self.upsamples[:-2]):
            x_BTHWC = layer(x_BTHWC, walk)
        given = [self.upsamples[-2].blocks(x_BTHWC, walk), x_BTHWC]
        del x_BTHWC
        # two convolutions of each block and the head's, of rows half as high, and the one behind the doubling
        reach, rows_each = len(self.upsamples[-1].upsamples) + 1, given[0].shape[2] // z_BFHWC.shape[2]
        return walk.spatial.by_rows(self._last, given, walk, rows_each, reach)

    def _last(self, given: list[Tensor], walk: Walk) -> tuple[Tensor, Tensor | None]:
        """The last doubling, the last stage and the head of (x, the doubled stage's input), which are taken out of `given`."""
        beside_BTHWC, y_BTHWC = given.pop(), given.pop()
        x_BTHWC = self.upsamples[-2].double(y_BTHWC, beside_BTHWC, walk)
        del y_BTHWC, beside_BTHWC
        x_BTHWC = self.upsamples[-1](x_BTHWC, walk)
        return self.head["2"].apart(walk.activate(x_BTHWC, self.head["0"].gamma), walk)


class WanVAE(nn.Module):
    """The Wan2.2 VAE of sizes `dims`.

    `encode` and `decode` take a whole clip or the next piece of a stream; with `keep` they also return the state for the next piece (None otherwise).
    Everything is differentiable. `spatial` says where the rows of a frame live; `pointwise` is norm + SiLU + past (replaceable by a fused kernel).
    """

    def __init__(self, dims: VAEDims, *, spatial: WholeFrame = WHOLE_FRAME, pointwise: Callable = norm_silu):
        super().__init__()
        self.dims, self.spatial, self.pointwise = dims, spatial, pointwise
        self.encoder = Encoder(dims)
        self.conv1 = Conv(2 * dims.z_dim, 2 * dims.z_dim, (1, 1, 1))
        self.conv2 = Conv(dims.z_dim, dims.z_dim, (1, 1, 1))
        self.decoder = Decoder(dims)

    def drop_encoder(self) -> None:
        """Keeps the decoder only (checkpoints without encoder weights)."""
        self.encoder = self.conv1 = None

    def encode(self, x_BCTHW: Tensor, state: VAEState | None = None, *, keep: bool = True) -> tuple[Tensor, Tensor, VAEState | None]:
        """Pixels [B,3,T,H,W] in [-1,1] -> (mu, logvar) [B,z,F,H/16,W/16] and the state.

        T is 1 + 4k at the start of a stream and 4k later; H and W are multiples of 16. Raises InputError otherwise.
        """
        if self.encoder is None:
            raise InputError("this VAE has no encoder weights: it only decodes; use vae_type wan to encode images or videos")
        T, H, W = x_BCTHW.shape[2:]
        check_clip(self.dims, T, H, W, start=state is None)
        walk = Walk(state, keep=keep, spatial=self.spatial, pointwise=self.pointwise)
        moments = self.conv1(self.encoder(to_patches(x_BCTHW), walk), walk).permute(0, 4, 1, 2, 3)
        mu, logvar = moments.chunk(2, 1)
        return mu, logvar, walk.state()

    def decode(self, z_BCFHW: Tensor, state: VAEState | None = None, *, keep: bool = True) -> tuple[Tensor, VAEState | None]:
        """Latents [B,z,F,h,w] (not normalised) -> pixels [B,3,T,16h,16w], not clamped, and the state. T = 4F, less 3 at the start of a stream."""
        x_BTHWC, bias, state = self._patches(z_BCFHW, state, keep, False)
        return from_patches(x_BTHWC if bias is None else x_BTHWC + bias), state

    def decode_bytes(self, z_BCFHW: Tensor, state: VAEState | None = None, *, keep: bool = True, reuse: bool = False) -> tuple[Tensor, VAEState | None]:
        """Like `decode`, but the pixels are uint8 [B,T,16h,16w,3]. With `reuse` the new state takes the memory of `state`, which is then void."""
        x_BTHWC, bias, state = self._patches(z_BCFHW, state, keep, reuse)
        return patches_to_bytes(x_BTHWC, bias), state

    def _patches(self, z_BCFHW: Tensor, state: VAEState | None, keep: bool, reuse: bool) -> tuple[Tensor, Tensor | None, VAEState | None]:
        walk = Walk(state, keep=keep, spatial=self.spatial, pointwise=self.pointwise, reuse=reuse)
        x_BTHWC, bias = self.decoder(self.conv2(z_BCFHW.permute(0, 2, 3, 4, 1).contiguous(), walk), walk)
        return x_BTHWC, bias, walk.state()


def channels_last(module: nn.Module) -> None:
    """Lays convolution kernels out as the VAE's activations are, in place, so that no call converts them."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous(memory_format=FORMATS.get(parameter.dim(), torch.contiguous_format))


def check_clip(dims: VAEDims, frames: int, height: int, width: int, *, start: bool) -> None:
    """Raises InputError, with the equation, for a clip that the encoder cannot take."""
    time, space = 2 ** sum(dims.temporal_down), PATCH * 2 ** (len(dims.multipliers) - 1)
    if start and time == TEMPORAL_STRIDE:
        latent_frames(frames)
    elif start and (frames < 1 or (frames - 1) % time):
        raise InputError(f"{frames} frames cannot be encoded: this VAE takes 1 + {time}k frames")
    elif not start and (frames < 1 or frames % time):
        raise InputError(f"{frames} frames cannot continue a stream: after the first piece the VAE takes {time}k frames; use {max(1, frames // time) * time}")
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % space:
            raise InputError(f"{name} {value} is not a multiple of {space} (VAE stride); use {max(space, round(value / space) * space)}")
