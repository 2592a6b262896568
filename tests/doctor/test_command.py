"""`python -m lamina.doctor`: the shape of its output and its exit status."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest
from expecttest import assert_expected_inline

from lamina.doctor import report, verdict
from lamina.doctor.__main__ import main, ordered
from lamina.doctor.checks import CHECKS, Check, Kit, WrongAnswerError, run
from lamina_core import versions
from lamina_core.errors import TorchHookError
from lamina_core.torch_hooks.doors import Proof


def sound(kit):
    kit.close(kit.numbers(3), kit.numbers(3), "numbers")


def wrong(kit):
    kit.close(kit.numbers(3) + 1, kit.numbers(3), "numbers plus one")


def broken(kit):
    raise ZeroDivisionError("no such thing")


@pytest.fixture
def few(monkeypatch):
    """A self-test of the checks that a test puts in."""
    checks: list[Check] = []
    monkeypatch.setattr("lamina.doctor.__main__.ordered", lambda: checks)
    known = {"lamina": "0.1", "torch": "2.13.0", "optree": "0.20", "numpy": "2.4"}
    known |= {"python": "3.11.7", "platform": "Linux"}
    for place in ("lamina.doctor.__main__.versions", "lamina.doctor.report.versions"):
        monkeypatch.setattr(place, lambda: known)
    monkeypatch.setattr(report, "devices", lambda: ["cpu: x86_64, AVX2, 1 threads"])
    monkeypatch.setattr(report, "prove", lambda: [Proof("modes", "everything", True, "")])
    none = report.schema_record.Report([], [], {})
    monkeypatch.setattr(report.schema_record, "report", lambda: none)
    return checks


def printed(*arguments):
    out = io.StringIO()
    status = main([*arguments, "--device", "cpu"], out)
    return status, re.sub(r"\d+\.\d\d s", "0.00 s", out.getvalue())


def test_all_is_well(few):
    few.append(Check("sums", sound, True))
    status, text = printed()
    assert status == 0
    assert_expected_inline(
        text,
        """\
Lamina 0.1 on torch 2.13.0 (tested: 2.11 to 2.15), Python 3.11.7
self-test, 1 checks on cpu
  ok   sums (cpu, 0.00 s)

platform:  Linux
packages:  optree 0.20, numpy 2.4
device:    cpu: x86_64, AVX2, 1 threads
hooks:     1 of 1 into torch's private parts proved
ops:       0 new, 0 gone, 0 changed, beside those that rules were checked with
self-test: 1 of 1 checks passed

all is well
""",
    )


def test_a_check_that_fails_and_one_that_raises(few):
    few += [Check("sums", wrong, True), Check("halves", broken, True), Check("rest", sound, True)]
    status, text = printed()
    assert status == 1
    assert "  FAIL sums (cpu, 0.00 s)\n  FAIL halves (cpu, 0.00 s)\n  ok   rest" in text
    assert "self-test: 1 of 3 checks passed" in text
    assert "PROBLEM: check sums, on cpu\n  found:  numbers plus one: " in text
    assert "found:  ZeroDivisionError: no such thing" in text
    assert text.count("to fix: reinstall Lamina and torch") == 2
    assert text.endswith("something is wrong: see above\n")


def test_a_hook_that_is_not_reached(few, monkeypatch):
    failed = Proof("modes", "everything", False, "seen: nothing")
    monkeypatch.setattr(report, "prove", lambda: [failed])
    status, text = printed()
    assert status == 1
    assert "PROBLEM: hook modes\n  found:  seen: nothing\n  to fix: it is needed for: eve" in text
    assert "pip install 'torch>=2.11,<2.16'" in text


def test_ops_that_differ_are_a_note(few, monkeypatch):
    found = report.schema_record.Report(["aten::new"], ["aten::old"], {"aten::x": "x(Tensor)"})
    monkeypatch.setattr(report.schema_record, "report", lambda: found)
    status, text = printed()
    assert status == 0
    assert "ops:       1 new, 1 gone, 1 changed" in text
    assert "  new: aten::new\n  gone: aten::old\n" in text
    assert "note: op aten::x\n  found:  x(Tensor)\n  to fix: its rules are left out" in text


def test_an_untested_torch(few, monkeypatch):
    monkeypatch.setattr(report, "is_tested", lambda: False)
    few.append(Check("sums", wrong, True))
    status, text = printed()
    assert status == 1
    assert "untested:  torch 2.13.0 (tested: 2.11 to 2.15)" in text
    assert "to fix: install a torch that Lamina has been tested with" in text


def test_json(few):
    few += [Check("sums", sound, True), Check("halves", wrong, False)]
    status, text = printed("--json")
    found = json.loads(text)
    assert status == 1
    assert set(found) == set("ok versions tested devices hooks ops checks problems".split())
    assert found["ok"] is False
    assert [check["ok"] for check in found["checks"]] == [True, False]
    assert set(found["problems"][0]) == set("kind name detail advice fatal".split())
    status, text = printed("--json", "--quick")
    assert status == 0
    assert [check["name"] for check in json.loads(text)["checks"]] == ["sums"]


def test_as_a_user_runs_it():
    done = subprocess.run(
        [sys.executable, "-m", "lamina.doctor", "--quick", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all is well\n")
    assert done.stderr == ""


@pytest.mark.slow
def test_every_check_passes_here():
    results = run(ordered())
    assert [f"{r.name}: {r.detail}" for r in results if not r.ok] == []
    assert len({check.name for check in CHECKS}) == len(CHECKS) == len(results)


def test_what_a_kit_finds():
    kit = Kit()
    x = kit.numbers(3)
    kit.close({"a": [x, (x,)]}, {"a": [x, (x,)]}, "a tree")
    kit.close(x.bfloat16(), x.bfloat16(), "halves")
    for actual, words in {
        (x + 1e-6): "is right",
        x[:2]: r"shape \[2\]",
        x.float(): "torch.float32",
    }.items():
        with pytest.raises(WrongAnswerError, match=words):
            kit.close(actual, x, "numbers")
    with pytest.raises(WrongAnswerError, match="2 results, 1 are right"):
        kit.close([x, x], [x], "numbers")
    with pytest.raises(WrongAnswerError, match="no ValueError"):
        kit.raises(ValueError, lambda: None, "nothing")


def test_the_verdict_on_an_untested_torch(monkeypatch):
    verdict.decide()
    monkeypatch.setattr(verdict, "CHECKS", [Check("sums", wrong, True), Check("x", broken, False)])
    with pytest.raises(TorchHookError, match=r"which is untested\n  sums: numbers plus one"):
        verdict.decide()


def test_whether_a_torch_is_tested(monkeypatch):
    for version, tested in {
        "2.10.1": False,
        "2.11.0": True,
        "2.15.9": True,
        "2.16.0a0": False,
    }.items():
        monkeypatch.setattr(versions.torch, "__version__", version)
        assert versions.is_tested() == tested
