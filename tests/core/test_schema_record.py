"""The record of schemas: a rule serves the op it was written for, and no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamina.autodiff.declare import FORWARD, REVERSE, linear
from lamina.batching.table import RULES
from lamina.decompose.table import DECOMPOSED
from lamina_core import schema_record
from lamina_core.config import config
from lamina_core.errors import ChangedOpsWarning, RuleError
from lamina_core.overloads import NAMESPACES, aten
from lamina_core.rules import RuleTable
from lamina_core.versions import TESTED, minor_version

ROOT = Path(__file__).parents[2]
TABLES = (RULES, REVERSE, FORWARD, DECOMPOSED)
VERSION = ".".join(map(str, minor_version(torch.__version__)))


def ours(x):
    return x


ours.__module__ = "lamina.demo"


@pytest.fixture
def as_changed(monkeypatch):
    """Has the record know another `aten.sin`."""
    changed = dict(schema_record._accepted())
    changed["aten::sin"] = ["aten::sin(Tensor self, bool fast=False) -> Tensor"]
    monkeypatch.setattr(schema_record, "_accepted", lambda: changed)
    monkeypatch.setattr(schema_record, "_refused", set())


# -- the record ------------------------------------------------------------------------------------


def test_the_record_has_all_tested_versions_and_the_running_one():
    versions = [minor_version(v) for v in schema_record._read().versions]
    assert (versions[0], versions[-1]) == TESTED
    assert versions == sorted(versions)
    assert VERSION in schema_record._read().versions


def test_this_torch_is_as_recorded():
    assert schema_record.report() == ([], [], {})


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.transform)
def test_every_rule_is_for_an_op_of_a_tested_version(table):
    """A name that no version has is a misspelt one."""
    named = [rule.op for rule in (*table, *table.absent)]
    from_torch = [op for op in named if op.namespace in NAMESPACES]
    assert from_torch
    assert [str(op) for op in from_torch if not schema_record.is_recorded(op)] == []
    assert table.changed == []


def test_versions_are_noted_so_that_one_more_changes_few_lines():
    versions = ["2.11", "2.12", "2.13"]
    for have in (versions, ["2.11"], ["2.12", "2.13"], ["2.12"], ["2.11", "2.13"]):
        note = schema_record._note_of(have, versions)
        assert schema_record._versions_of(note.removeprefix("  # "), versions) == have
    assert schema_record._note_of(["2.12", "2.13"], versions) == "  # since 2.12"
    assert schema_record._note_of(["2.11"], versions) == "  # until 2.11"


def test_recording_a_version_again_changes_nothing(tmp_path, monkeypatch):
    copy = tmp_path / "schemas.txt"
    copy.write_text(schema_record.PATH.read_text())
    monkeypatch.setattr(schema_record, "PATH", copy)
    schema_record.record()
    schema_record._accepted.cache_clear()
    assert copy.read_text() == (ROOT / "core/lamina_core/schemas.txt").read_text()


def test_recording_a_new_version_adds_what_is_new_there(tmp_path, monkeypatch):
    copy = tmp_path / "schemas.txt"
    older = "aten::of_the_past(Tensor self) -> Tensor"
    copy.write_text(f"# torch 2.9\naten::sin(Tensor self) -> Tensor\n{older}\n")
    monkeypatch.setattr(schema_record, "PATH", copy)
    schema_record._accepted.cache_clear()
    new, gone, changed = schema_record.report()
    assert "aten::cos" in new
    assert (gone, changed) == (["aten::of_the_past"], {})
    schema_record.record()
    lines = copy.read_text().splitlines()
    assert lines[0] == f"# torch 2.9 {VERSION}"
    assert {
        "aten::sin(Tensor self) -> Tensor",
        f"{older}  # until 2.9",
        f"aten::cos(Tensor self) -> Tensor  # since {VERSION}",
    } <= set(lines)
    schema_record._accepted.cache_clear()


# -- a changed op ----------------------------------------------------------------------------------


def test_check_says_what_is_different(as_changed):
    assert schema_record.check(aten.cos.default) is None
    assert schema_record.check(aten.of_the_future.default) is None
    assert schema_record.check(aten.sin.default) == (
        "aten::sin(Tensor self) -> Tensor, where the record has "
        "aten::sin(Tensor self, bool fast=False) -> Tensor"
    )
    assert list(schema_record.report().changed) == ["aten::sin"]


def test_a_rule_for_a_changed_op_is_an_error_under_test(as_changed):
    with pytest.raises(RuleError) as caught:
        RuleTable("demo").register(aten.sin.default, ours)
    assert str(caught.value) == (
        "aten.sin.default is not the op that its rule was written for\n"
        "  aten::sin(Tensor self) -> Tensor, where the record has "
        "aten::sin(Tensor self, bool fast=False) -> Tensor\n"
        "  to fix: see that the rule is right for it, and run "
        "`python -m lamina_core.schema_record --record`"
    )


def test_a_rule_for_a_changed_op_is_left_out_in_use_and_said_once(as_changed, monkeypatch):
    monkeypatch.setattr(config, "schemas", "warn")
    table = RuleTable("demo")
    for op in (aten.sin.default, aten.cos.default):
        table.register(op, ours)
    assert [rule.op for rule in table] == [aten.cos.default]
    assert [rule.op for rule in table.changed] == [aten.sin.default]
    with pytest.warns(ChangedOpsWarning) as caught:
        schema_record.warn_of_changes()
    assert str(caught[0].message).splitlines()[:2] == [
        f"ops of torch {torch.__version__} are not those that Lamina has rules for",
        "  changed: aten.sin.default",
    ]
    schema_record.warn_of_changes()


def test_a_declaration_may_name_arguments_that_a_changed_op_lacks(as_changed, monkeypatch):
    monkeypatch.setattr(config, "schemas", "warn")
    table = RuleTable("demo")
    monkeypatch.setattr("lamina.autodiff.declare.REVERSE", table)
    monkeypatch.setattr("lamina.autodiff.declare.FORWARD", RuleTable("demo"))
    transpose = lambda ct, fast: ct
    transpose.__module__ = "lamina.demo"
    linear(aten.sin.default, transpose)
    assert [rule.op for rule in table.changed] == [aten.sin.default]


def test_rules_of_others_are_for_the_torch_that_they_run(as_changed):
    table = RuleTable("demo")
    table.register(aten.sin.default, lambda x: x)
    assert [rule.op for rule in table] == [aten.sin.default]


def test_a_rule_of_ours_for_an_op_that_is_not_in_the_record_is_an_error_under_test(monkeypatch):
    monkeypatch.setattr(schema_record, "_accepted", dict)
    with pytest.raises(RuleError, match="is not in the record"):
        RuleTable("demo").register(aten.sin.default, ours)


# Has a share of the ops be others than those recorded, imports Lamina, and compares with autograd.
_CHANGED = """
import warnings
import zlib

import torch
from torch import nn

from lamina_core import schema_record
from lamina_core.torch_hooks import doors

doors.require_proofs = lambda when: None  # they need some of the rules
recorded = schema_record._accepted()
for name in recorded:
    if zlib.crc32(name.encode()) % 4 == {share}:
        recorded[name] = ["another"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lamina
print([warning.category.__name__ for warning in caught if "lamina" in warning.category.__module__])
lamina.config.fallback = "silent"
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(20, 3), nn.Softmax(1)
).double()
parameters = dict(model.named_parameters())
xs = torch.randn(5, 2, 7, dtype=torch.float64)

def loss(parameters, x):
    return lamina.functional_call(model, parameters, (x[None],)).square().sum()

def usual(x):
    return torch.autograd.grad(model(x[None]).square().sum(), list(parameters.values()))

found = lamina.vmap(lamina.grad(loss), (None, 0))(parameters, xs)
for name, *expected in zip(parameters, *[usual(x) for x in xs], strict=True):
    torch.testing.assert_close(found[name], torch.stack(expected))
_, moved = lamina.jvp(lambda x: loss(parameters, x), (xs[0],), (xs[1],))
torch.testing.assert_close(moved, (lamina.grad(loss, 1)(parameters, xs[0]) * xs[1]).sum())
"""


@pytest.mark.slow
@pytest.mark.parametrize("share", range(4))
def test_whichever_ops_have_changed_the_answers_are_right(share):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _CHANGED.format(share=share)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), LAMINA_SCHEMAS="warn"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['ChangedOpsWarning']\n"
