"""The recorded numbers of the published implementation, recomputed here (longlive/evaluation/parity)."""

from __future__ import annotations

from pathlib import Path

import pytest

from longlive.evaluation.parity import check_entry, read_folder
from longlive.evaluation.parity.rules import read_rules

DATA = Path(__file__).with_name("data")
RULES = read_rules(DATA)
ENTRIES = read_folder(DATA)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_entry(entry):
    result = check_entry(entry, RULES)
    assert result.status == "passed", result


def test_the_data_is_complete():
    """A file that gets lost must not look like a passing test."""
    modes = {entry.mode for entry in ENTRIES}
    assert modes == {
        "ar_loss", "denoising_steps", "dit_bidirectional", "dit_cached_rollout", "dit_teacher_forcing", "dmd", "error_buffer", "halo", "keys", "lora_merge",
        "nvfp4", "prompts", "sampler", "t5", "vae",
    }  # fmt: skip
    assert len(ENTRIES) == 115
