"""Running the engines over a golden folder, one result per entry.

An entry is a tensor file or one case of a table. Its status:

* `passed`     every compared output is within tolerance, and every `raises` output was refused with an InputError
* `failed`     an output is off, missing or not refused, or the engine broke
* `left-out`   the agreement excludes all of it (`differs`); the reason is given
* `no-engine`  nothing here computes it yet; counts as failed when the entry is required

A required glob without a slash names files (`dit_*`, `keys.json`): such a file must not be without an engine as a whole.
A glob with a slash names cases (`keys/lora_*`): each case it matches must have an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import torch

from ...core.errors import InputError, NotAvailable
from .compare import Difference, compare_table, compare_tensor
from .engines import engine_for, reason_without
from .entries import TABLE_SEPARATOR, Case, Entry, read_folder
from .rules import Rule, read_rules, rule_for

PASSED, FAILED, LEFT_OUT, NO_ENGINE = "passed", "failed", "left-out", "no-engine"
STATUSES = (PASSED, FAILED, LEFT_OUT, NO_ENGINE)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out for one entry. `share` is the largest error divided by its tolerance; None when nothing was compared."""

    name: str
    mode: str
    status: str
    error: float | None = None
    share: float | None = None
    tolerance: str = ""
    compared: int = 0
    notes: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


def check_folder(folder: Path, required: Sequence[str] = ()) -> Iterator[Result]:
    """Recompute every entry of `folder` in float32 on the CPU and yield the results by file name, those without engine last.

    required: globs of entries that must have an engine. Raises InputError for a folder that cannot be read, and for a
    required glob that matches nothing.
    """
    entries, rules = read_folder(folder), read_rules(folder)
    unmatched = [glob for glob in required if not any(_matches(entry, glob) for entry in entries)]
    if unmatched:
        raise InputError(f"--require {unmatched[0]} matches no entry of {folder}; look at its file names")
    with_engine = set()
    pending: list[tuple[Entry | Case, Result]] = []
    for entry in entries:
        result = check_entry(entry, rules)
        if result.status != NO_ENGINE:
            with_engine.add(entry.file)
            yield result
        else:
            pending.append((entry, result))
    for entry, result in pending:
        globs = [g for g in required if _matches(entry, g) and (TABLE_SEPARATOR in g or entry.file not in with_engine)]
        yield replace(result, status=FAILED, notes=(*result.notes, f"required by {globs[0]}")) if globs else result


def check_entry(entry: Entry | Case, rules: list[Rule]) -> Result:
    """Recompute one entry and judge it under `rules`. A broken engine is a failed entry, not an exception."""
    kept, left_out = _sort_by_rule(entry, rules)
    base = Result(name=entry.name, mode=entry.mode, status=LEFT_OUT, left_out=left_out)
    if not kept:
        return base
    engine = engine_for(entry.mode)
    if engine is None:
        return replace(base, status=NO_ENGINE, notes=(reason_without(entry.mode),))
    if isinstance(entry, Case):
        entry, prose = _without_prose(entry, engine)
        base = replace(base, left_out=left_out | prose)
    torch.manual_seed(0)
    try:
        entry = entry.with_weights() if isinstance(entry, Entry) else entry
    except InputError as error:
        return replace(base, status=FAILED, notes=(str(error),))
    try:
        found = [pair for rule, names in kept.items() for pair in _judge(entry, engine, rule, names)]
    except NotAvailable as error:
        return replace(base, status=NO_ENGINE, notes=(str(error),))
    worst = max(found, key=lambda pair: pair[1].share)[1]
    status = PASSED if worst.ok else FAILED
    notes = tuple(f"{name}: {d.note or f'error {d.error:.3g} is {d.share:.3g} times the tolerance'}" for name, d in found if d.note or not d.ok)
    tolerance = "must be refused" if all(rule.status == "raises" for rule in kept) else _tolerance_words(entry, [name for name, _ in found])
    return replace(base, status=status, error=worst.error, share=worst.share, tolerance=tolerance, compared=len(found), notes=notes)


def summary(results: Sequence[Result]) -> dict[str, int]:
    """How many entries have each status."""
    return {status: sum(result.status == status for result in results) for status in STATUSES}


def _matches(entry: Entry | Case, glob: str) -> bool:
    if TABLE_SEPARATOR in glob:
        return fnmatchcase(entry.name, glob)
    return fnmatchcase(entry.file, glob) or fnmatchcase(entry.file.rsplit(".", 1)[0], glob)


def _sort_by_rule(entry: Entry | Case, rules: list[Rule]) -> tuple[dict[Rule, list[str]], dict[str, str]]:
    """Outputs to look at, grouped by what their rule asks of the engine, and those left out with the reason."""
    names = list(entry.outputs) if isinstance(entry, Entry) else [entry.case]
    kept: dict[Rule, list[str]] = {}
    left_out = {}
    for name in names:
        rule = rule_for(rules, entry.file, f"out/{name}" if isinstance(entry, Entry) else name)
        if rule.status == "differs":
            left_out[name] = rule.why
        else:
            kept.setdefault(Rule(status=rule.status, setting=rule.setting), []).append(name)
    return kept, left_out


def _judge(entry: Entry | Case, engine: ModuleType, rule: Rule, names: list[str]) -> list[tuple[str, Difference]]:
    """(output name, difference) for the outputs that share one rule."""
    narrow = _narrowing(engine, rule.setting)
    if narrow is None:
        return [(name, _failure(f"the engine does not know the setting '{rule.setting}'")) for name in names]
    try:
        ours = engine.run(entry.asking(names, rule.setting)) if isinstance(entry, Entry) else engine.run_case(entry.case, entry.input)
    except NotAvailable:
        raise
    except InputError as error:
        refused = rule.status == "raises" or (isinstance(entry, Case) and _recorded_refusal(entry))
        note = f"refused: {error}"
        return [(name, Difference(error=0.0, share=0.0, note=note) if refused else _failure(note)) for name in names]
    except Exception as error:  # an engine that breaks fails its entry, and the others still run
        return [(name, _failure(f"{type(error).__name__}: {error}")) for name in names]
    if rule.status == "raises" or (isinstance(entry, Case) and _recorded_refusal(entry)):
        return [(name, _failure("bad input was not refused")) for name in names]
    if isinstance(entry, Case):
        return [(entry.case, compare_table(narrow(ours), narrow(entry.output), entry.float_tolerance))]
    ours = {name.removeprefix("out/"): value for name, value in ours.items()}
    return [(name, _compare(entry.asking(names, rule.setting), engine, name, ours[name]) if name in ours else _failure("not computed")) for name in names]


def _compare(entry: Entry, engine: ModuleType, name: str, ours: torch.Tensor) -> Difference:
    """`ours` against the recorded output, where the engine says that it is compared."""
    recorded = entry.outputs[name]
    mask = engine.keep(entry, name) if hasattr(engine, "keep") and ours.shape == recorded.shape else None
    if mask is None:
        return compare_tensor(name, ours, recorded, entry.tolerance)
    return compare_tensor(name, ours[mask], recorded[mask], entry.tolerance)


def _narrowing(engine: ModuleType, setting: str | None):
    """What to keep of an output under `setting` (everything without one); None when the engine does not know the setting."""
    if setting is None:
        return lambda output: output
    return engine.SETTINGS.get(setting) if hasattr(engine, "SETTINGS") else None


def _without_prose(case: Case, engine: ModuleType) -> tuple[Case, dict[str, str]]:
    """The case without the recorded fields that are words about the published code, and the reasons (`PROSE` of the engine)."""
    prose = engine.PROSE.get(case.case, {}) if hasattr(engine, "PROSE") else {}
    if not prose:
        return case, {}
    return replace(case, output={key: value for key, value in case.output.items() if key not in prose}), prose


def _recorded_refusal(case: Case) -> bool:
    """Tables record input that the published code refuses as an output with the single field `error`."""
    return isinstance(case.output, dict) and set(case.output) == {"error"}


def _failure(note: str) -> Difference:
    return Difference(error=float("inf"), share=float("inf"), note=note)


def _tolerance_words(entry: Entry | Case, names: list[str]) -> str:
    if isinstance(entry, Case):
        return f"floats {entry.float_tolerance:g}" if entry.float_tolerance else "exact"
    t = entry.tolerance
    words = "exact" if t["rtol"] == t["atol"] == 0 else f"{t['atol']:g} + {t['rtol']:g}|out|"
    return words + (f", grad {t['grad_rel_fro']:g}" if any(name.startswith("grad.") for name in names) else "")
