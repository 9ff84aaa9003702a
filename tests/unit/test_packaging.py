"""What `make setup` installs is pinned, complete, and comes from wherever the user's pip is told to look."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = [line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([A-Za-z0-9._]+)$")


def plain(name: str) -> str:
    """A requirement's project name, as package indexes compare them."""
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", name)[0]).lower()


def test_every_line_of_the_lock_pins_one_release():
    assert not [line for line in LOCK if not PINNED.match(line)]
    assert "torch==2.13.0" in LOCK


def test_the_lock_holds_what_the_package_and_its_tests_need():
    locked = {plain(line) for line in LOCK}
    needed = {plain(name) for name in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"], *PROJECT["optional-dependencies"]["compat"]]}
    assert needed <= locked, needed - locked


def test_no_index_or_host_is_named():
    for name in ("requirements.lock", "requirements.txt", "Makefile", "pyproject.toml", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links", text), name


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 and "make test" in script.read_text(encoding="utf-8")


def test_data_files_of_the_package_are_shipped():
    """Files beside the code that is read at run time must be named in pyproject, or an installed package lacks them."""
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]["longlive"]
    package = ROOT / "longlive"
    listed = {path for pattern in shipped for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts}
    assert others <= listed, others - listed
