"""How far back the VAE's encoder looks, read off its layers.

Start a stream in the middle of a film: its first frames lack their past, and every layer over time spreads that lack to later frames of its output.
Followed through the encoder, layer by layer, this is the number of latent frames at the start that differ from those of the whole film.
"""

from __future__ import annotations

from .wan_vae import Conv, Downsample, Encoder, Residual


def exact_halo(encoder: Encoder) -> int:
    """Latent frames that must be encoded and dropped before a latent frame is as in the whole clip: 27 for Wan2.2 (spec training §5.5).

    The stream's very first latent, an image, is dropped besides (`parallel.halo`).
    """
    return frames_without_past(encoder) - 1


def frames_without_past(encoder: Encoder) -> int:
    """Leading latent frames of a stream that depend on what came before it."""
    lacking = _through(encoder.conv1, 0)
    for stage in encoder.downsamples:
        _, time, _ = stage.shape
        shortcut = -(-(lacking + time - 1) // time)  # average_down: frames in groups of `time`, of which the stream's first one is alone
        for layer in stage.downsamples:
            lacking = _through(layer, lacking)
        lacking = max(lacking, shortcut)
    for layer in (*encoder.middle, encoder.head["2"]):
        lacking = _through(layer, lacking)
    return lacking


def _through(layer, lacking: int) -> int:
    """Leading frames that lack their past behind `layer`, when `lacking` do before it."""
    if isinstance(layer, Residual):
        return _through(layer.residual["6"], _through(layer.residual["2"], lacking))
    if isinstance(layer, Downsample) and layer.time_conv is not None:
        return _through(layer.time_conv, lacking)
    if isinstance(layer, Conv) and layer.weight.dim() == 5:
        return -(-(lacking + layer.weight.shape[2] - 1) // layer.stride[0])
    return lacking
