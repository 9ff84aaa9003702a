"""Which of our modules recomputes which mode. A mode that is not here has no engine yet.

An engine module offers `run(entry) -> {name: tensor}` (names without `out/`; exactly the outputs in `entry.wanted`,
`InputError` for input that we refuse, `NotAvailable` for a variant whose engine comes later) or, for tables,
`run_case(name, input) -> output`. Its `SETTINGS` (optional) maps the words of a `must_with` rule to a function
`narrow(output) -> output` that keeps what is compared under that setting; `entry.setting` carries the same words.
For tensors, its `keep(entry, name)` (optional) gives a bool tensor of what is compared of an output, or None for all of it.
Its `PROSE` (optional) names, per case of a table, recorded fields that are words about the published code, with the reason to leave them out.
"""

from __future__ import annotations

import importlib
from types import ModuleType

ENGINES = {
    "ar_loss": "ar_loss",
    "denoising_steps": "sampler",
    "dit_bidirectional": "dit",
    "dit_cached_rollout": "dit",
    "dit_teacher_forcing": "dit",
    "dmd": "dmd",
    "error_buffer": "error_buffer",
    "halo": "halo",
    "keys": "keys",
    "lora_merge": "lora",
    "nvfp4": "nvfp4",
    "prompts": "prompts",
    "sampler": "sampler",
    "t5": "t5",
    "vae": "vae",
}

LATER = {
    "dit_cached_rollout_kvquant": "the quantised cache is not available yet",
}


def engine_for(mode: str) -> ModuleType | None:
    """The module that recomputes `mode`, or None."""
    name = ENGINES.get(mode)
    return None if name is None else importlib.import_module(f"{__package__}.{name}")


def reason_without(mode: str) -> str:
    """Why `mode` has no engine."""
    return LATER.get(mode, f"nothing here recomputes mode '{mode}'")
