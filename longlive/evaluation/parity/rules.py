"""The agreement: per output, whether we must reproduce it, and where being right means being different."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ...core.errors import InputError
from .entries import read_json

STATUSES = ("must", "must_with", "differs", "raises")
SHIPPED = Path(__file__).with_name("agreement.json")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """status: must | must_with (under `setting`) | differs (not compared) | raises (the input is bad; refuse it)."""

    file: str = "*"
    tensor: str = "*"
    status: str = "must"
    setting: str | None = None
    why: str = ""


MUST = Rule()


def read_rules(folder: Path) -> list[Rule]:
    """The rules of `folder/agreement.json`, or of the shipped copy when the folder has none."""
    own = Path(folder) / "agreement.json"
    path = own if own.exists() else SHIPPED
    rules = []
    for number, row in enumerate(read_json(path).get("rules", [])):
        status = row.get("status")
        if status not in STATUSES:
            raise InputError(f"{path}: rule {number} has status {status!r}; use one of {', '.join(STATUSES)}")
        rules.append(Rule(file=row["file"], tensor=row["tensor"], status=status, setting=row.get("with"), why=row.get("why", "")))
    return rules


def rule_for(rules: list[Rule], file: str, tensor: str) -> Rule:
    """The first rule that matches; `must` when none does. `tensor` is `out/...` in a tensor file, the case name in a table."""
    return next((rule for rule in rules if fnmatchcase(file, rule.file) and fnmatchcase(tensor, rule.tensor)), MUST)
