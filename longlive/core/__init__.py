"""Pure facts: geometry, stories, schedules, token metadata, errors. No I/O, no CUDA, nothing of ours imported."""
