"""`import longlive` is quick, and what it promises is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import longlive


@pytest.mark.parametrize("name", longlive.__all__)
def test_every_promised_name_is_there(name):
    assert getattr(longlive, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        longlive.Pipelines


def test_importing_the_package_imports_no_torch():
    code = "import sys, longlive; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
