"""A second stream on a machine without a GPU: what waits for what, told by stand-ins for the streams."""

from contextlib import nullcontext

import pytest
import torch

from longlive.engine.decode import SideStream


class Stream:
    def __init__(self, told):
        self.told = told

    def wait_stream(self, other):
        self.told.append("side waits")

    def synchronize(self):
        self.told.append("host waits")


class Kept:
    """A stream state that tells when it is copied."""

    def __init__(self, told):
        self.told = told

    def clone(self):
        self.told.append("copied")
        return Kept(self.told)


@pytest.fixture
def told(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda **_: Stream(events))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: "generating")
    monkeypatch.setattr(torch.cuda, "stream", lambda *_: nullcontext())
    return events


def test_a_state_is_read_once_the_stream_that_made_it_has_written_it(told):
    """`state` copies on the generating stream, behind whatever is queued there; `restore` reads that copy on another stream."""
    stage = SideStream(type("Codec", (), {"device": torch.device("cuda:0")}))
    stage.restore(Kept(told))
    assert told == ["host waits", "side waits", "copied", "host waits"]
