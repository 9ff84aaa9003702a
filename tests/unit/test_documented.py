"""Every name that the LongLive 2.0 documentation promises is served by code that exists, or is said to come later."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
import yaml

from longlive.config.keys import home_of
from longlive.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TABLE = yaml.safe_load((ROOT / "docs" / "documented.yaml").read_text(encoding="utf-8"))
TOPICS = TABLE.pop("later")
LATER = "later: "
DEFINES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def documented() -> list[tuple[str, str]]:
    """(kind, name) of every line of the extract."""
    lines = (ROOT / "tests" / "data" / "documented_names.txt").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(": ", 1)) for line in lines if line and not line.startswith("#")]


def targets(kind: str, name: str) -> list[str]:
    entry = TABLE[kind][name]
    return entry if isinstance(entry, list) else [entry]


@cache
def names_in(path: Path) -> frozenset[str]:
    """What a Python file defines at its top level and inside its classes (`Class.member`), imported names included."""
    found: set[str] = set()

    def visit(body, prefix):
        for node in body:
            if isinstance(node, DEFINES):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        found.add(prefix + target.id)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                found.update(prefix + (alias.asname or alias.name) for alias in node.names)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def problem(target: str) -> str | None:
    """Why a target does not hold, or None."""
    if target.startswith(LATER):
        topic = target.removeprefix(LATER)
        return None if topic in TOPICS else f"unknown topic {topic!r}"
    place, _, symbol = target.partition("::")
    if place == "config":
        try:
            return None if home_of(symbol, "documented") is not None else f"the schema ignores {symbol}"
        except ConfigError as error:
            return str(error)
    path = ROOT / place
    if not path.exists():
        return f"{place} does not exist"
    if not symbol:
        return None
    if path.suffix == ".py" and all(part.isidentifier() for part in symbol.split(".")):
        return None if symbol in names_in(path) else f"{place} defines no {symbol}"
    return None if symbol in path.read_text(encoding="utf-8") else f"{symbol!r} does not stand in {place}"


def test_the_extract_is_whole():
    """A line lost from the extract must not look like a documented name less."""
    names = documented()
    assert len(names) == len(set(names)) == 175
    assert {kind for kind, _ in names} == {"command", "flag", "value", "file", "field", "caption_field", "import", "call", "snippet", "rule"}


def test_no_documented_name_is_unmapped():
    missing = [f"{kind}: {name}" for kind, name in documented() if name not in TABLE.get(kind, {})]
    assert not missing, "\n".join(missing)


def test_nothing_is_mapped_that_is_not_documented():
    names = set(documented())
    extra = [f"{kind}: {name}" for kind, entries in TABLE.items() for name in entries if (kind, name) not in names]
    assert not extra, "\n".join(extra)


@pytest.mark.parametrize("kind", sorted(TABLE))
def test_what_serves_a_name_exists(kind):
    wrong = [f"{name} -> {target}: {problem(target)}" for name in TABLE[kind] for target in targets(kind, name) if problem(target)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "target",
    [
        "later: Someday",
        "config::inference.sinks",
        "longlive/nothing.py",
        "longlive/core/story.py::no_such_function",
        "longlive/core/story.py::Storyboard.no_such_field",
        "Makefile::no such target",
    ],
)
def test_a_target_that_does_not_exist_is_seen(target):
    assert problem(target) is not None


def test_symbols_are_found_in_classes():
    assert problem("longlive/core/story.py::Storyboard.shots") is None
