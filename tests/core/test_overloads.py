"""`aten`: ops of every version of torch, of which the running one may lack some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamina.autodiff.declare import Linear, linear
from lamina_core.errors import AbsentOpError, RuleError
from lamina_core.overloads import Namespace, aten, is_absent, overloads
from lamina_core.rules import RuleTable
from lamina_core.schema import facts

ROOT = Path(__file__).parents[2]


def test_an_op_that_exists_is_the_overload_of_torch():
    assert aten.sum.dim_IntList is torch.ops.aten.sum.dim_IntList
    assert aten.sum.overloads() == torch.ops.aten.sum.overloads()
    assert aten.__and__.Tensor is torch.ops.aten.__and__.Tensor
    assert torch.equal(aten.sum(torch.ones(3)), torch.tensor(3.0))


def test_what_was_found_is_kept():
    found = Namespace("aten")
    assert found.mul.Tensor is vars(vars(found)["mul"])["Tensor"]
    assert found.of_the_future.default is found.of_the_future.default
    assert overloads("aten") is aten


@pytest.mark.parametrize(
    ("op", "name", "qualified"),
    [
        (aten.of_the_future.default, "aten.of_the_future.default", "aten::of_the_future"),
        (aten.sum.of_the_future, "aten.sum.of_the_future", "aten::sum.of_the_future"),
        (
            overloads("no_such_library").op.default,
            "no_such_library.op.default",
            "no_such_library::op",
        ),
    ],
    ids=["op", "overload", "library"],
)
def test_an_absent_op_has_names_and_no_arguments(op, name, qualified):
    assert is_absent(op)
    assert (str(op), op.name(), repr(op)) == (name, qualified, f"<Absent {name}>")
    known = facts(op)
    assert (known.name, known.arg_names, known.returns, known.is_composite) == (name, (), (), False)
    assert known.functional() is None


def test_calling_an_absent_op_names_it_and_the_version_of_torch():
    for call in (aten.of_the_future.default, aten.of_the_future, aten.of_the_future.default._op):
        with pytest.raises(AbsentOpError) as caught:
            call(torch.ones(3))
        assert str(caught.value) == (
            f"torch {torch.__version__} has no op aten.of_the_future.default\n"
            "  to fix: use what took its place in this version, or a torch that has the op"
        )


def test_a_rule_for_an_absent_op_is_noted_and_serves_nothing():
    table, op = RuleTable("demo"), aten.of_the_future.default
    table.register(op, abs)
    assert [(rule.op, rule.function) for rule in table.absent] == [(op, abs)]
    assert (len(table), list(table), table.lookup(op)) == (0, [], None)
    with pytest.raises(RuleError, match=r"a second demo rule for aten\.of_the_future\.default"):
        table.register(op, abs)


def test_a_declaration_for_an_absent_op_may_name_arguments_that_cannot_be_looked_up(monkeypatch):
    table = RuleTable("demo")
    monkeypatch.setattr("lamina.autodiff.declare.REVERSE", table)
    monkeypatch.setattr("lamina.autodiff.declare.FORWARD", RuleTable("demo"))
    linear(aten.of_the_future.default, lambda ct, its_argument: ct)
    (rule,) = table.absent
    assert rule.owner == f"{__name__}.{Linear.__name__}(aten.of_the_future.default)"


# Imports Lamina in a torch that lacks a share of the ops that it names, and prints how many.
_WITHOUT = """
import zlib
from lamina_core import overloads
from lamina_core.torch_hooks import doors

doors.require_proofs = lambda when: None  # they need some of the rules
found = overloads.Packet.__getattr__
share = {share}

def without(packet, name):
    op = found(packet, name)
    there = isinstance(op, overloads.torch._ops.OpOverload)
    if there and zlib.crc32(str(op).encode()) % 4 == share:
        op = overloads.Absent("aten", packet.__name__ + "_of_the_past", name)
        setattr(packet, name, op)
    return op

overloads.Packet.__getattr__ = without
import lamina
from lamina.autodiff.declare import FORWARD, REVERSE
from lamina.batching.table import RULES

for table in (RULES, REVERSE, FORWARD):
    print(len(table.absent), len(table))
"""


@pytest.mark.slow
@pytest.mark.parametrize("share", range(4))
def test_lamina_loads_whichever_ops_are_absent(share):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT.format(share=share)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts = [[int(n) for n in line.split()] for line in done.stdout.splitlines()]
    assert all(absent > 50 and present > 100 for absent, present in counts)
