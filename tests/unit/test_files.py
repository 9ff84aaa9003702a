"""Whatever writes beside and renames leaves files that others may read, as far as the umask lets them."""

import os

import pytest
import torch
from torch import nn

from longlive.core.files import share
from longlive.data.manifest import _write_cache
from longlive.data.shard_writer import write_tensors
from longlive.models.weights import save_state
from longlive.world.judge_training import save_judge

WRITERS = {
    "weights": lambda path: save_state(path, {"x": torch.zeros(2)}),
    "shards": lambda path: write_tensors(path, {"x": torch.zeros(2)}, {}),
    "manifest": lambda path: _write_cache(path, {}, True),
    "judge": lambda path: save_judge(nn.Linear(2, 2), path, {}),
}


@pytest.fixture(params=[0o027, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_written_file_has_the_mode_of_any_new_file(tmp_path, umask, writer):
    WRITERS[writer](tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_modes_fit_nothing_is_changed(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(type(tmp_path), "chmod", lambda path, mode: pytest.fail("changed"))
    share(tmp_path / "file")
