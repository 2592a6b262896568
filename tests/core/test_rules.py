"""`RuleTable`: registration is checked, and every op is in one of five states."""

from __future__ import annotations

import pytest
import torch

from lamina.autodiff import forward, reverse
from lamina.batching import user_ops
from lamina_core.errors import RuleError
from lamina_core.rules import STATES, RuleTable

aten = torch.ops.aten


def rule(x):
    return x


def other_rule(x):
    return x


@pytest.fixture
def table():
    made = RuleTable("demo")
    made.register(aten.sum.default, rule)
    made.register(aten.sum.dim_IntList, other_rule, state="family")
    return made


def test_lookup_is_by_overload(table):
    assert table.lookup(aten.sum.default).function is rule
    assert table.lookup(aten.sum.dim_IntList).function is other_rule
    assert table.lookup(aten.sum.IntList_out) is None


def test_a_rule_knows_its_op_its_state_and_its_owner(table):
    found = table.lookup(aten.sum.default)
    assert (found.op, found.state, found.owner) == (
        aten.sum.default,
        "rule",
        "tests.core.test_rules.rule",
    )
    assert table.lookup(aten.sum.dim_IntList).state == "family"


def test_iteration_is_in_order_of_registration(table):
    assert [found.op for found in table] == [aten.sum.default, aten.sum.dim_IntList]
    assert len(table) == 2


def test_siblings_are_the_registered_overloads_of_one_op(table):
    expected = ["aten.sum.default", "aten.sum.dim_IntList"]
    assert table.siblings(aten.sum.IntList_out) == expected
    assert table.siblings(aten.sin.default) == []


def test_describe(table):
    assert table.describe(aten.sum.default, "rule") == "rule (tests.core.test_rules.rule)"
    assert table.describe(aten.sin.default, "missing") == "missing"


def test_a_second_rule_is_refused_and_the_first_stays(table):
    with pytest.raises(RuleError, match=r"first owner: tests\.core\.test_rules\.rule\n"):
        table.register(aten.sum.default, other_rule)
    assert table.lookup(aten.sum.default).function is rule


@pytest.mark.parametrize(
    "op",
    [torch.sum, aten.sum, "aten.sum.default", None],
    ids=["function", "packet", "name", "none"],
)
def test_only_overloads_have_rules(table, op):
    with pytest.raises(RuleError, match="registered for an OpOverload"):
        table.register(op, rule)
    assert len(table) == 2


@pytest.mark.parametrize(
    ("module", "op", "state"),
    [
        (user_ops, aten.trace.default, "rule"),
        (user_ops, aten.sin.default, "family"),
        (user_ops, aten.sin_.default, "family"),
        (user_ops, aten.randn.default, "family"),
        (user_ops, aten.absolute.default, "decomposed"),
        (user_ops, aten._test_functorch_fallback.default, "generic"),
        (user_ops, aten.set_.source_Tensor_storage_offset, "missing"),
        (reverse, aten.cumprod.default, "rule"),
        (reverse, aten.sin.default, "family"),
        (reverse, aten.sin_.default, "family"),
        (reverse, aten.absolute.default, "decomposed"),
        (reverse, aten.set_.source_Tensor_storage_offset, "missing"),
        (forward, aten.sin.default, "family"),
        (forward, aten.absolute.default, "decomposed"),
        (forward, aten.set_.source_Tensor_storage_offset, "missing"),
    ],
    ids=lambda value: str(value).removeprefix("<module 'lamina.").partition("'")[0],
)
def test_states(module, op, state):
    assert state in STATES
    assert module.state_of(op) == state


@pytest.mark.parametrize("module", [user_ops, reverse, forward])
def test_every_op_of_aten_has_a_state(module):
    packets = [getattr(aten, name) for name in dir(aten)]
    overloads = [
        getattr(packet, name)
        for packet in packets
        if isinstance(packet, torch._ops.OpOverloadPacket)
        for name in packet.overloads()
    ]
    assert len(overloads) > 1000
    assert {module.state_of(op) for op in overloads} <= set(STATES)
