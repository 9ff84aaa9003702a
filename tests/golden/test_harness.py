"""The harness itself: on folders made up here, with engines made up here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from longlive.core.errors import InputError, NotAvailable
from longlive.evaluation.parity import check_folder, harness, summary
from longlive.evaluation.parity.compare import compare_table, compare_tensor
from longlive.evaluation.parity.rules import read_rules, rule_for

TOLERANCE = {"rtol": 0.0, "atol": 1e-3, "grad_rel_fro": 1e-3}


def write_entry(folder, name, outputs, *, mode="double", weights=None):
    metadata = {"mode": mode, "config": json.dumps({"factor": 2}), "tolerance": json.dumps(TOLERANCE), "weights": json.dumps(weights or {})}
    tensors = {"in/x": torch.arange(6.0)} | {f"out/{key}": value for key, value in outputs.items()}
    save_file(tensors, folder / f"{name}.safetensors", metadata)


def double(entry):
    return {"out/y": entry.inputs["x"] * entry.config["factor"], "z": entry.inputs["x"]}


def run(monkeypatch, folder, engine, required=()):
    modules = {"double": SimpleNamespace(run=engine)} if engine else {}
    monkeypatch.setattr(harness, "engine_for", modules.get)
    return {result.name: result for result in check_folder(folder, required)}


def agreement(folder, *rules):
    (folder / "agreement.json").write_text(json.dumps({"rules": [dict(zip(("file", "tensor", "status", "with", "why"), rule)) for rule in rules]}))


def test_passes_within_tolerance_and_fails_beyond(tmp_path, monkeypatch):
    write_entry(tmp_path, "near", {"y": torch.arange(6.0) * 2 + 5e-4})
    write_entry(tmp_path, "far", {"y": torch.arange(6.0) * 2 + 2e-3, "z": torch.arange(6.0)})
    results = run(monkeypatch, tmp_path, double)
    assert results["near"].status == "passed" and results["near"].share == pytest.approx(0.5, rel=1e-3)
    assert results["far"].status == "failed" and "y:" in results["far"].notes[0]
    assert summary(list(results.values())) == {"passed": 1, "failed": 1, "left-out": 0, "no-engine": 0}


@pytest.mark.parametrize("wrong", ["missing", "shape", "nan", "raises"])
def test_every_way_of_being_wrong_fails(tmp_path, monkeypatch, wrong):
    def engine(entry):
        if wrong == "raises":
            raise RuntimeError("broken")
        y = torch.arange(6.0)
        return {"missing": {}, "shape": {"y": y[:5]}, "nan": {"y": y * float("nan")}}[wrong]

    write_entry(tmp_path, "entry", {"y": torch.arange(6.0)})
    assert run(monkeypatch, tmp_path, engine)["entry"].status == "failed"


def test_raises_passes_only_when_the_input_is_refused(tmp_path, monkeypatch):
    write_entry(tmp_path, "entry", {"y": torch.arange(6.0) * 2, "bad": torch.zeros(1)})
    agreement(tmp_path, ("entry*", "out/bad", "raises"))

    def refuses(entry):
        if "bad" in entry.wanted:
            raise InputError("no")
        return double(entry)

    assert run(monkeypatch, tmp_path, refuses)["entry"].status == "passed"
    accepted = run(monkeypatch, tmp_path, lambda entry: double(entry) | {"bad": torch.zeros(1)})["entry"]
    assert accepted.status == "failed" and "not refused" in accepted.notes[0]
    breaks = run(monkeypatch, tmp_path, lambda entry: double(entry) if "y" in entry.wanted else 1 / 0)["entry"]
    assert breaks.status == "failed"


def test_left_out_outputs_are_named_with_their_reason(tmp_path, monkeypatch):
    write_entry(tmp_path, "whole", {"y": torch.zeros(6)})
    write_entry(tmp_path, "part", {"y": torch.arange(6.0) * 2, "odd": torch.zeros(1)})
    agreement(tmp_path, ("whole*", "*", "differs", None, "a defect"), ("part*", "out/odd", "differs", None, "another"))
    results = run(monkeypatch, tmp_path, double)
    assert results["whole"].status == "left-out" and results["whole"].left_out == {"y": "a defect"}
    assert results["part"].status == "passed" and results["part"].left_out == {"odd": "another"}


def test_without_engine_fails_only_when_required(tmp_path, monkeypatch):
    write_entry(tmp_path, "entry", {"y": torch.arange(6.0)})
    assert run(monkeypatch, tmp_path, None)["entry"].status == "no-engine"
    assert run(monkeypatch, tmp_path, None, ["ent*"])["entry"].status == "failed"
    later = run(monkeypatch, tmp_path, lambda entry: (_ for _ in ()).throw(NotAvailable("it", "wait")), ["entry"])
    assert later["entry"].status == "failed"
    with pytest.raises(InputError, match="matches no entry"):
        run(monkeypatch, tmp_path, double, ["nothing*"])


def test_tables_count_each_case_and_globs_with_a_slash_name_cases(tmp_path, monkeypatch):
    rows = (("one", 1, [1]), ("two", 2, [1]), ("bad", -1, {"error": "no"}), ("later", 9, []))
    cases = [{"name": name, "input": {"n": n}, "output": out} for name, n, out in rows]
    (tmp_path / "t.json").write_text(json.dumps({"mode": "count", "cases": cases}))

    def run_case(name, given):
        if given["n"] == 9:
            raise NotAvailable("nine", "wait")
        if given["n"] < 0:
            raise InputError("negative")
        return [given["n"]]

    monkeypatch.setattr(harness, "engine_for", {"count": SimpleNamespace(run_case=run_case)}.get)
    status = {result.name: result.status for result in check_folder(tmp_path, ["t*"])}
    assert status == {"t/one": "passed", "t/two": "failed", "t/bad": "passed", "t/later": "no-engine"}
    status = {result.name: result.status for result in check_folder(tmp_path, ["t/l*"])}
    assert status["t/later"] == "failed"


def test_a_setting_that_the_engine_does_not_know_fails(tmp_path, monkeypatch):
    write_entry(tmp_path, "entry", {"y": torch.arange(6.0) * 2})
    agreement(tmp_path, ("entry*", "*", "must_with", "upside down", "why"))
    assert run(monkeypatch, tmp_path, double)["entry"].status == "failed"
    engine = SimpleNamespace(run=double, SETTINGS={"upside down": lambda output: output})
    monkeypatch.setattr(harness, "engine_for", {"double": engine}.get)
    assert [result.status for result in check_folder(tmp_path)] == ["passed"]


def test_words_about_the_published_code_are_left_out_with_a_reason(tmp_path, monkeypatch):
    case = {"name": "one", "input": {}, "output": {"n": 1, "remark": "n was counted by hand"}}
    (tmp_path / "t.json").write_text(json.dumps({"mode": "count", "cases": [case]}))
    engine = SimpleNamespace(run_case=lambda name, given: {"n": 1}, PROSE={"one": {"remark": "words"}})
    monkeypatch.setattr(harness, "engine_for", {"count": engine}.get)
    (result,) = check_folder(tmp_path)
    assert result.status == "passed" and result.left_out == {"remark": "words"}
    engine.run_case = lambda name, given: {"n": 2}
    assert [result.status for result in check_folder(tmp_path)] == ["failed"]


def test_first_matching_rule_wins(tmp_path):
    agreement(tmp_path, ("a*", "out/x", "differs", None, "w"), ("a*", "*", "raises"))
    rules = read_rules(tmp_path)
    assert [rule_for(rules, "a.safetensors", name).status for name in ("out/x", "out/y")] == ["differs", "raises"]
    assert rule_for(rules, "b.safetensors", "out/x").status == "must"
    agreement(tmp_path, ("a*", "*", "perhaps"))
    with pytest.raises(InputError, match="perhaps"):
        read_rules(tmp_path)


def test_gradients_are_judged_as_a_whole_and_zero_tolerance_means_equal():
    out = torch.tensor([1000.0, 0.0])
    assert compare_tensor("grad.w", out + torch.tensor([0.0, 0.5]), out, TOLERANCE).ok
    assert not compare_tensor("w", out + torch.tensor([0.0, 0.5]), out, TOLERANCE).ok
    exact = {"rtol": 0.0, "atol": 0.0, "grad_rel_fro": 0.0}
    assert compare_tensor("w", out, out.clone(), exact).ok and not compare_tensor("w", out + 1e-3, out, exact).ok


@pytest.mark.parametrize(("ours", "ok"), [([1, 2.0], True), ([1, 2.1], False), ([1], False), ([True, 2.0], False), ({"a": 1}, False)])
def test_tables_are_equal_or_not(ours, ok):
    assert compare_table(ours, [1, 2.0], 0.0).ok is ok


@pytest.mark.parametrize("content", ["missing", "empty", "other"])
def test_a_folder_without_golden_files_is_bad_input(tmp_path, content):
    folder = tmp_path / "folder"
    if content != "missing":
        folder.mkdir()
    if content == "other":
        (folder / "notes.json").write_text("{}")
        save_file({"w": torch.zeros(1)}, folder / "w.weights.safetensors")
    with pytest.raises(InputError):
        list(check_folder(folder))


def test_a_missing_weight_file_fails_the_entry(tmp_path, monkeypatch):
    write_entry(tmp_path, "entry", {"y": torch.arange(6.0)}, weights={"dit": "gone.safetensors"})
    agreement(tmp_path, ("*", "*", "raises"))  # a missing file is no refusal
    result = run(monkeypatch, tmp_path, lambda entry: entry.weights)["entry"]
    assert result.status == "failed" and "gone.safetensors" in result.notes[0]
