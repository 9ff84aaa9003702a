"""Which device a process trains on: its own GPU, or one line that says why there is none."""

import pytest
import torch

from longlive.core.errors import InputError
from longlive.train.launch import training_device


def test_without_a_gpu_a_word_that_names_one_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert training_device("auto", 0) == training_device("cpu", 3) == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match="inference.device = cuda"):
            training_device(name, 0)


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda word: None)
    for switch in ("allow_tf32", "benchmark", "benchmark_limit"):
        monkeypatch.setattr(torch.backends.cudnn, switch, getattr(torch.backends.cudnn, switch))
    for name in ("auto", "cuda"):
        assert training_device(name, 2) == torch.device("cuda:2")
    assert training_device("cuda:3", 0) == torch.device("cuda:3") and [device.index for device in taken] == [2, 2, 3]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert training_device("cuda", 1) == torch.device("cuda:1")
    with pytest.raises(InputError, match=r"inference.device\(cuda:3\) is one GPU for 4 processes of this host; set it to auto"):
        training_device("cuda:3", 1)
