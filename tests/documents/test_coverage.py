"""The table of coverage says what is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from lamina import coverage
from lamina.autodiff import forward, reverse
from lamina.autodiff.declare import FORWARD
from lamina.batching import user_ops
from lamina.batching.table import RULES
from lamina_core.overloads import aten
from lamina_core.rules import STATES, Rule
from lamina_core.schema import facts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coverage.md"


def test_the_page_is_what_the_command_makes(tmp_path):
    text = PAGE.read_text()
    made_with = re.search(r"Made with torch (\S+) by", text)[1]
    if made_with != torch.__version__:
        pytest.skip(
            f"the page was made with torch {made_with}, whose ops are not those of this one"
        )
    found = tmp_path / "coverage.md"
    # A process of its own: tests define ops and load modules that do.
    paths = os.pathsep.join(str(ROOT / top) for top in ("core", "transforms"))
    printed = subprocess.run(
        [sys.executable, "-m", "lamina.coverage", "--save", str(found)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed in text
    assert found.read_text() == text, f"run: python -m lamina.coverage --save {PAGE.name}"


@pytest.fixture(scope="module")
def table():
    return coverage.rows()


def overload(row):
    base, _, name = row.name.partition(".")
    return getattr(getattr(torch.ops.aten, base), name)


def test_a_row_for_every_overload(table):
    names = {row.name for row in table}
    assert len(names) == len(table)
    assert {"add.Tensor", "add_.Tensor", "_foreach_add.List", "lstm.data", "where.self"} <= names
    assert not names & {"add.out", "empty.memory_format", "rand.default"}
    for row in table:
        assert set(row.states[:3]) <= {*STATES, "loop", "borrowed"}


# The function that makes the handler of an op, by the state of the op.
MADE_BY = {
    "vmap": {
        "rule": {"_rule_handler", "_view_handler", "under_autocast"},
        "family": {
            "_rule_handler",
            "_view_handler",
            "_unary_handler",
            "_nary_handler",
            "_random_handler",
        },
        "decomposed": {"decompose_handler", "_random_handler"},
        "generic": {"_fallback_handler"},
        "missing": {"_data_dependent_handler"},
    },
    "derivative": {
        "rule": {"_rule_handler", "under_autocast"},
        "family": {
            "_pointwise_handler",
            "_linear_handler",
            "_rule_handler",
            "_constant_handler",
        },
        "decomposed": {"decompose_handler"},
        "generic": {"_rule_handler"},
        "missing": {"_rule_handler"},
    },
}


@pytest.mark.parametrize(
    ("module", "resolve", "kind"),
    [
        (user_ops, user_ops.resolve, "vmap"),
        (reverse, reverse._resolve, "derivative"),
        (forward, forward._resolve, "derivative"),
    ],
    ids=["vmap", "vjp", "jvp"],
)
def test_a_state_is_what_the_handler_does(table, module, resolve, kind):
    wrong = []
    for row in table:
        op = overload(row)
        state, known = module.state_of(op), facts(op)
        maker = resolve(op).__qualname__.partition(".")[0]
        if maker in ("in_place_handler", "mutate"):
            counterpart = known.functional()
            expected = "missing" if counterpart is None else module.state_of(counterpart)
            if state != expected:
                wrong.append((row.name, state, expected))
        elif maker not in MADE_BY[kind][state]:
            wrong.append((row.name, state, maker))
    assert wrong == []


def test_the_counts_add_up(table):
    text = coverage.summary(table)
    lines = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    for column, transform in enumerate(("vmap", "vjp", "jvp"), 1):
        counts = Counter(getattr(row, transform) for row in table)
        assert {line[0]: int(line[column]) for line in lines} == {
            state: counts[state] for state, *_ in lines
        }
        assert sum(counts.values()) == len(table)


def test_rules_for_ops_of_other_versions_are_listed(table, monkeypatch):
    added = [(RULES, "vmap"), (FORWARD, "jvp")]
    for rules, _ in added:
        gone = Rule(aten.of_the_future.default, abs, "rule", "builtins.abs")
        monkeypatch.setattr(rules, "absent", [*rules.absent, gone])
    assert coverage.absent()["of_the_future.default"] == ["vmap", "jvp"]
    assert "of_the_future.default (vmap, jvp)" in coverage.summary(table).splitlines()[-1]


def test_known_rows(table):
    states = {row.name: row.states for row in table}
    assert states["median.default"][0] == "rule"
    assert states["sin.default"][:3] == ("family", "family", "family")
    assert states["lstm.data"][:3] == ("decomposed", "decomposed", "decomposed")
    assert states["nonzero.default"][0] == "missing"
    assert states["lstm.input"][3:] == ("loop", "decomposed")
    assert states["sum.dim_IntList"][3:] == ("kernel", "formula")
