"""Whether a rule can be called like its op: held against every rule that we have ourselves."""

from __future__ import annotations

import pytest
import torch

from lamina.autodiff.declare import FORWARD, REVERSE
from lamina.batching.table import RULES
from lamina.decompose import table as decompositions
from lamina_core.errors import RuleError
from lamina_core.signature import need_out_of_place, need_signature, overload_of

aten = torch.ops.aten
TABLES = {"batching": (RULES, 2), "vjp": (REVERSE, 1), "jvp": (FORWARD, 1)}


@pytest.mark.parametrize("name", TABLES)
def test_every_rule_can_be_called_like_its_op(name):
    table, leading = TABLES[name]
    checked = 0
    for rule in table:
        if not callable(rule.function):  # a declaration
            continue
        given = () if rule.state == "decomposed" else ("info", "in_dims")[:leading]
        need_signature(name, rule.op, rule.function, given)
        checked += 1
    assert checked > 50


def test_every_decomposition_can_be_called_like_its_op():
    for op, function in decompositions._TABLE.items():
        need_signature("decomposition", op, function, ())


def test_functions_of_c_are_taken_as_they_are():
    need_signature("rule", aten.sin.default, torch.sin, ("level",))


def test_star_arguments_fit_everything():
    need_signature("rule", aten.sum.dim_IntList, lambda *args, **kwargs: None, ("level",))


def test_overloads():
    assert overload_of(aten.sin.default) is aten.sin.default

    @torch.library.custom_op("lamina_signatures::one", mutates_args=())
    def one(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    assert overload_of(one) is torch.ops.lamina_signatures.one.default
    for wrong in (aten.sin, torch.sin, "aten.sin.default", None):
        with pytest.raises(RuleError, match="registered for an overload"):
            overload_of(wrong)


def test_writes():
    need_out_of_place("rule", aten.sin.default)
    with pytest.raises(RuleError, match=r"register it for aten\.sin\.default"):
        need_out_of_place("rule", aten.sin_.default)
