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
from .spec import VAEDims

PATCH = 2
PAST = 2
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


class VAEState(NamedTuple):
    """What a stream must remember: per temporal layer, in the order of execution, the last frames it saw (x_BPHWC).

    A pytree of tensors of the activations' dtype; one state belongs to the encoder or to the decoder, never to both.
    """

    caches: tuple[Tensor, ...]

    def clone(self) -> "VAEState":
        return VAEState(tuple(cache.clone() for cache in self.caches))


def norm_silu(x_BTHWC: Tensor, gamma: Tensor, past_BPHWC: Tensor | None = None) -> Tensor:
    """SiLU(x / ||x|| * sqrt(C) * gamma) behind `past` in time: [B, P + T, H, W, C]. Statistics in float32 (spec §5.2)."""
    with torch.autocast(x_BTHWC.device.type, enabled=False):
        normed = rms(x_BTHWC, gamma)
        if past_BPHWC is None:
            return F.silu(normed)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return torch.cat([past_BPHWC, F.silu(normed)], 1)
        B, T, H, W, C = x_BTHWC.shape
        out = x_BTHWC.new_empty(B, past_BPHWC.shape[1] + T, H, W, C)
        out[:, :-T] = past_BPHWC
        torch.ops.aten.silu.out(normed, out=out[:, -T:])
        return out


def rms(x: Tensor, gamma: Tensor) -> Tensor:
    """x / max(||x||, ~1e-12) * sqrt(C) * gamma over the last dimension."""
    channels = x.shape[-1]
    if _plain_cpu(x) and x.dtype == torch.float32:  # fewer passes over memory than the composite rms_norm
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(1e-12)
        return (x * length.reciprocal_().mul_(channels**0.5)).mul_(gamma.flatten())
    return F.rms_norm(x, (channels,), gamma.flatten().to(x.dtype), 1e-24 / channels)


def _plain_cpu(x: Tensor) -> bool:
    """Eager inference on a CPU, where in-place and library calls without a gradient are allowed."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class WholeFrame:
    """Where the rows of a frame are: here, all of them. Other strategies (row tiles, row shards with halo) replace this object.

    `pad` supplies the rows and columns outside the frame that a convolution reads; `gather` and `own` bracket work that needs whole frames.
    """

    def convolve(self, conv: "Conv", x_BTHWC: Tensor) -> Tensor:
        top, bottom, left, right = conv.border
        if (top, left) != (bottom, right):
            x_BTHWC, top, left = F.pad(x_BTHWC, (0, 0, left, right, top, bottom)), 0, 0
        return conv.kernel(x_BTHWC, (top, left))

    def gather(self, x_BTHWC: Tensor) -> Tensor:
        return x_BTHWC

    def own(self, x_BTHWC: Tensor) -> Tensor:
        return x_BTHWC


WHOLE_FRAME = WholeFrame()


class Walk:
    """One pass over a piece of a stream: hands each temporal layer what the piece before left, and collects what this one leaves.

    `first` is True at the start of a stream. `keep` False leaves nothing (whole clips, training).
    """

    def __init__(self, state: VAEState | None, *, keep: bool, spatial: WholeFrame, pointwise: Callable):
        self.first, self.spatial, self.pointwise = state is None, spatial, pointwise
        self._given, self._left, self._at = state, [] if keep else None, 0

    def past(self, x_BTHWC: Tensor, frames: int = PAST) -> Tensor:
        """The `frames` inputs that this layer saw before x; zeros at the start of a stream."""
        if self._given is None:
            B, _, H, W, C = x_BTHWC.shape
            return x_BTHWC.new_zeros(B, frames, H, W, C)
        self._at += 1
        return self._given.caches[self._at - 1]

    def leave(self, padded_BTHWC: Tensor, frames: int = PAST) -> Tensor:
        """Keeps the last `frames` of what the layer read, as a copy (a view would hold the whole activation)."""
        if self._left is not None:
            self._left.append(padded_BTHWC[:, -frames:].clone())
        return padded_BTHWC

    def extend(self, x_BTHWC: Tensor) -> Tensor:
        return self.leave(torch.cat([self.past(x_BTHWC), x_BTHWC], 1))

    def activate(self, x_BTHWC: Tensor, gamma: Tensor) -> Tensor:
        """norm, SiLU and the past of a 3-frame convolution in one step."""
        return self.leave(self.pointwise(x_BTHWC, gamma, self.past(x_BTHWC)))

    def state(self) -> VAEState | None:
        return None if self._left is None else VAEState(tuple(self._left))


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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's convolution default: uniform within 1/sqrt(fan_in)."""
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        return walk.spatial.convolve(self, x_BTHWC)

    def kernel(self, x_BTHWC: Tensor, pad: tuple[int, int]) -> Tensor:
        """The bare convolution with symmetric zero padding `pad` = (rows, columns)."""
        if self.weight.dim() == 5:
            return convolution(x_BTHWC.permute(0, 4, 1, 2, 3), self.weight, self.bias, self.stride, (0, *pad)).permute(0, 2, 3, 4, 1)
        frames = x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)
        return convolution(frames, self.weight, self.bias, self.stride, pad).permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])


def convolution(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """conv2d or conv3d by the weight's dimensions, channels-last in and out."""
    if _plain_cpu(x) and torch.backends.mkldnn.is_available() and x.dtype == weight.dtype == torch.float32:
        # torch sends small inputs to a convolution ten times slower than this one
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1,) * len(stride), 1)
    return (F.conv3d if weight.dim() == 5 else F.conv2d)(x, weight, bias, stride, padding)


class DoublingConv(Conv):
    """Each pixel doubled in both directions, then a 3x3 convolution: done on the small grid, 4 taps instead of 9.

    Of the three rows that an output row reads, two are the same source row, so their taps add up: output row 2h + j reads source rows h + j - 1 and
    h + j, with taps (w0, w1 + w2) for j = 0 and (w0 + w1, w2) for j = 1; columns likewise. One 2x2 convolution computes the four phases (j, k).
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, (3, 3))

    def phases(self) -> Tensor:
        """[4 O, I, 2, 2]: the taps of phase (j, k), j slower. Sums are formed in at least float32."""
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        rows = torch.stack([torch.stack([w[:, :, 0], w[:, :, 1] + w[:, :, 2]], 2), torch.stack([w[:, :, 0] + w[:, :, 1], w[:, :, 2]], 2)])
        left, right = torch.stack([rows[..., 0], rows[..., 1] + rows[..., 2]], -1), torch.stack([rows[..., 0] + rows[..., 1], rows[..., 2]], -1)
        return torch.stack([left, right], 1).flatten(0, 2).to(self.weight.dtype)

    def kernel(self, x_BTHWC: Tensor, pad: tuple[int, int]) -> Tensor:
        B, T = x_BTHWC.shape[:2]
        y = convolution(x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2), self.phases(), self.bias.repeat(4), (1, 1), pad).permute(0, 2, 3, 1)
        return Interleave.apply(y.unflatten(-1, (2, 2, -1))).unflatten(0, (B, T))


class Interleave(torch.autograd.Function):
    """Four phases side by side -> one image: out[2h + j, 2w + k] = y[h + j, w + k, j, k], y[N, h, w, j, k, C] with one row and column more than the source."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        N, H, W, _, _, C = y.shape
        out = y.new_empty(N, H - 1, 2, W - 1, 2, C)
        for j, k in PHASES:
            out[:, :, j, :, k] = y[:, j : H - 1 + j, k : W - 1 + k, j, k]
        return out.flatten(3, 4).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        N, H, W, C = grad.shape
        H, W = H // 2, W // 2
        grad, out = grad.reshape(N, H, 2, W, 2, C), grad.new_zeros(N, H + 1, W + 1, 2, 2, C)
        for j, k in PHASES:
            out[:, j : H + j, k : W + k, j, k] = grad[:, :, j, :, k]
        return out


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
        y = self.residual["2"](walk.activate(x_BTHWC, self.residual["0"].gamma), walk)
        y = self.residual["6"](walk.activate(y, self.residual["3"].gamma), walk)
        return y + (x_BTHWC if self.shortcut is None else self.shortcut(x_BTHWC, walk))


class FrameAttention(nn.Module):
    """Single-head attention among all positions of one frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.to_qkv, self.proj = Norm(channels, 2), Conv(channels, 3 * channels, (1, 1)), Conv(channels, channels, (1, 1))

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        with torch.autocast(x_BTHWC.device.type, enabled=False):
            normed = rms(x_BTHWC, self.norm.gamma)
        whole = walk.spatial.gather(self.to_qkv(normed, walk))
        q, k, v = whole.flatten(2, 3).flatten(0, 1).unsqueeze(1).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
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
    """With `temporal` twice the frames, the stream's first frame kept single; then each pixel doubled in both directions and a 3x3 convolution."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": DoublingConv(channels)})
        self.time_conv = Conv(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        if self.time_conv is not None:
            x_BTHWC = self._double_frames(x_BTHWC, walk)
        return self.resample["1"](x_BTHWC, walk)

    def _double_frames(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        # The stream's first frame never enters time_conv, neither as input nor as past.
        head, x_BTHWC = x_BTHWC[:, : int(walk.first)], x_BTHWC[:, int(walk.first) :]
        past = walk.leave(torch.cat([walk.past(x_BTHWC), x_BTHWC], 1))
        if x_BTHWC.shape[1] == 0:
            return head
        B, T, H, W, C = x_BTHWC.shape
        pairs = self.time_conv(past, walk).view(B, T, H, W, 2, C).permute(0, 1, 4, 2, 3, 5).reshape(B, 2 * T, H, W, C)
        return torch.cat([head, pairs], 1) if walk.first else pairs


def average_down(x_BTHWC: Tensor, outputs: int, time: int, space: int) -> Tensor:
    """Parameter-free shortcut of the encoder: blocks of time x space x space become channels (c, i, j, k), averaged in groups down to `outputs`."""
    B, T, H, W, C = x_BTHWC.shape
    if T % time:
        x_BTHWC = F.pad(x_BTHWC, (0, 0, 0, 0, 0, 0, time - T % time, 0))
    blocks = x_BTHWC.reshape(B, -1, time, H // space, space, W // space, space, C)
    flat = blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, -1, H // space, W // space, C * time * space * space)
    return flat.unflatten(-1, (outputs, -1)).mean(-1)


def duplicate_up(x_BTHWC: Tensor, outputs: int, time: int, first: bool) -> Tensor:
    """Parameter-free shortcut of the decoder: out[co, time t + i, 2h + j, 2w + k] = x[(co 4 time + 4 i + 2 j + k) // rep], rep = 4 time outputs / C.

    At the start of a stream the leading time - 1 frames are dropped.
    """
    B, T, H, W, C = x_BTHWC.shape
    repeats = outputs * 4 * time // C
    blocks = x_BTHWC.unsqueeze(-1).expand(B, T, H, W, C, repeats).reshape(B, T, H, W, outputs, time, 2, 2)
    out = blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, T * time, 2 * H, 2 * W, outputs)
    return out[:, time - 1 :] if first else out


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
        self.shape = None if last else (outputs, 2 if temporal else 1)

    def forward(self, x_BTHWC: Tensor, walk: Walk) -> Tensor:
        y = x_BTHWC
        for layer in self.upsamples:
            y = layer(y, walk)
        return y if self.shape is None else y + duplicate_up(x_BTHWC, *self.shape, walk.first)


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
    """[B, F, h, w, z] -> [B, T, 8h, 8w, 12] patches."""

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

    def forward(self, z_BFHWC: Tensor, walk: Walk) -> Tensor:
        x_BTHWC = self.conv1(walk.extend(z_BFHWC), walk)
        for layer in (*self.middle, *self.upsamples):
            x_BTHWC = layer(x_BTHWC, walk)
        return self.head["2"](walk.activate(x_BTHWC, self.head["0"].gamma), walk)


def to_patches(x_BCTHW: Tensor) -> Tensor:
    """Pixels [B,3,T,H,W] -> [B,T,H/2,W/2,12], channel = c*4 + column*2 + row (the column is the slower one, spec §5.2)."""
    B, C, T, H, W = x_BCTHW.shape
    return x_BCTHW.reshape(B, C, T, H // PATCH, PATCH, W // PATCH, PATCH).permute(0, 2, 3, 5, 1, 6, 4).reshape(B, T, H // PATCH, W // PATCH, -1)


def from_patches(x_BTHWC: Tensor) -> Tensor:
    """The inverse of `to_patches`."""
    B, T, H, W, C = x_BTHWC.shape
    return x_BTHWC.reshape(B, T, H, W, C // PATCH**2, PATCH, PATCH).permute(0, 4, 1, 2, 6, 3, 5).reshape(B, -1, T, H * PATCH, W * PATCH)


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
        walk = Walk(state, keep=keep, spatial=self.spatial, pointwise=self.pointwise)
        x_BTHWC = self.decoder(self.conv2(z_BCFHW.permute(0, 2, 3, 4, 1).contiguous(), walk), walk)
        return from_patches(x_BTHWC), walk.state()


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
