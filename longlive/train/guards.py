"""What ends a run with a sentence instead of a traceback: steps without a usable gradient, and memory that does not suffice.

Whether a gradient is finite is decided on the device: the optimizer leaves out a step that is refused (`optim.guarded_step`). The host reads the
decision one step late, so that the device never waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ..core.errors import InputError, LongLiveError
from ..core.log import environment, logger
from .memory import GIB, MARGIN

SKIPS_IN_A_ROW = 10


class Late:
    """A scalar on the device that the host reads later: on a GPU it is on its way to the host while the next work is being queued."""

    def __init__(self, value: torch.Tensor):
        self.value, self.arrived = value, None
        if value.is_cuda:
            self.value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self.value.copy_(value, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> float:
        """Waits for the work that was queued before this was made, and for no later work."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.value.item()


class SkippedSteps:
    """Counts steps whose gradient norm was not finite. The norm is equal on all ranks, so all count alike."""

    def __init__(self):
        self.row, self.last = 0, 0

    def count(self, sound: bool, step: int) -> int:
        """How many steps have been skipped in a row, this one included."""
        self.row, self.last = (0, self.last) if sound else (self.row + 1, step)
        if not sound:
            logger.warning("step %d skipped: its gradient is not finite (%d of at most %d in a row)", step, self.row, SKIPS_IN_A_ROW)
        return self.row

    def message(self) -> str:
        first = self.last - self.row + 1
        return (
            f"the gradients of steps {first} to {self.last} are not finite: training stopped, the weights are those of step {first - 1}; "
            "use a lower training.lr or a longer training.warmup_steps, and look at the data"
        )


@contextmanager
def memory_advice(config: Mapping) -> Iterator[None]:
    """Raises LongLiveError, with what to lower, in the place of an error about memory. `config`: as `config_table` gives it."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        advice = no_memory(error, config)
        if advice is None:
            raise
        raise LongLiveError(advice) from error


def no_memory(error: Exception, config: Mapping) -> str | None:
    """One line that says what to lower, for an error about memory; None for any other. `config`: as `config_table` gives it."""
    text = str(error).strip() or type(error).__name__
    if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in text:
        return None
    return f"out of memory ({text.splitlines()[0][:160]}); {_what_to_lower(config)}"


def _what_to_lower(config: Mapping) -> str:
    training, infra = config.get("training", {}), config.get("infra", {})
    advice = [f"training.batch_size({training.get('batch_size')})", _length(config)]
    raised = [] if infra.get("gradient_checkpointing") else ["infra.gradient_checkpointing: true"]
    raised += [f"infra.{key}: 0" for key in ("keep_blocks", "keep_attention") if infra.get(key, 0) != 0]
    raised += [f"a larger infra.sequence_parallel_size({infra.get('sequence_parallel_size')})"]
    raised += ["infra.sharding_strategy: full"] if infra.get("sharding_strategy") != "full" else []
    return f"lower {' or '.join(advice)}, or use {' or '.join(raised)}"


def _length(config: Mapping) -> str:
    """The setting that says how long a sample is."""
    data, training = config.get("data", {}), config.get("training", {})
    if config.get("algorithm", {}).get("trainer") == "score_distillation":
        return f"training.num_training_frames({training.get('num_training_frames')})"
    if data.get("data_path") is None:
        return f"world.chunks({config.get('world', {}).get('chunks')})"
    return f"data.image_or_video_shape[1]({data.get('image_or_video_shape', [0, 0])[1]} latent frames)"


def check_room(estimate: float, room: float, config: Mapping) -> None:
    """Raises InputError, with what to lower, where a step of `estimate` bytes has no chance in `room` bytes; warns where it may not fit."""
    if estimate <= room:
        return
    text = f"a step is estimated to take {estimate / GIB:.1f} GiB in each process, which may use {room / GIB:.1f} GiB here; {_what_to_lower(config)}"
    if estimate > MARGIN * room:
        raise InputError(text)
    logger.warning("%s", text)


def room_for(device: torch.device) -> int:
    """Bytes that this process may use: of a GPU all, of this host its share of what other programs leave."""
    if device.type == "cuda":
        return device_memory(device)
    import psutil

    return psutil.virtual_memory().available // int(environment("LOCAL_WORLD_SIZE", "1")) + psutil.Process().memory_info().rss


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
