"""The table of windows that the ranks of a sharded VAE encode take."""

from __future__ import annotations

from ...parallel.halo import halo_windows


def run_case(name: str, given: dict) -> dict:
    """`given`: latent_frames, sp_size, halo, raw_frames. Raises InputError for frames that do not divide by the ranks."""
    windows = halo_windows(given["latent_frames"], given["sp_size"], given["halo"], given["raw_frames"])
    return {"rank_metas": [window.row() for window in windows]}
