"""Each check of the doctor finds what it is for: something is broken, and it has to fail."""

from __future__ import annotations

import dis
import functools
import inspect
import sys

import pytest
import torch

import lamina
from lamina.batching.table import RULES
from lamina.doctor.__main__ import ordered
from lamina.doctor.checks import run
from lamina.extend import pointwise, temporary_rules
from lamina_core import pytree
from lamina_core.user_function import UserFunction

aten = torch.ops.aten
CHECKS = {check.name: check for check in ordered()}
# Those that return a function of the arguments, and those that return an answer.
CURRIED = ("functional_call", "grad", "hessian", "jacfwd", "jacrev", "linear_transpose", "vmap")
DIRECT = ("hvp", "jvp", "linearize", "vhp", "vjp", "grad_and_value")


def scaled(tree):
    """An answer that is wrong."""

    def wrong(x):
        if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()):
            return x * 1.5 + 0.25
        return scaled_function(x) if inspect.isfunction(x) else x

    return pytree.tree_map(wrong, tree)


def scaled_function(function):
    @functools.wraps(function)
    def wrong(*args, **kwargs):
        return scaled(function(*args, **kwargs))

    return wrong


def wrongly(name):
    """A function of Lamina whose answers are wrong."""
    usual = getattr(lamina, name)
    if name in CURRIED and name != "functional_call":
        return lambda *args, **kwargs: scaled_function(usual(*args, **kwargs))
    return scaled_function(usual)


def globals_of(code):
    """The globals that code reads; `torch.autograd.grad` is none of ours."""
    return {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}


def names_in(function, seen=None):
    """The functions of Lamina that a check calls, itself or by a helper of its module."""
    seen = set() if seen is None else seen
    module = sys.modules[function.__module__]
    found: set[str] = set()
    pending = [function.__code__]
    while pending:
        code = pending.pop()
        pending += [constant for constant in code.co_consts if inspect.iscode(constant)]
        for name in globals_of(code):
            value = getattr(module, name, None)
            if name in (*CURRIED, *DIRECT):
                found.add(name)
            elif getattr(value, "__module__", "") == module.__name__ and name not in seen:
                seen.add(name)
                if inspect.isfunction(value):
                    found |= names_in(value, seen)
    return found


def failing(check):
    (result,) = run([check])
    return not result.ok


# A check of errors compares no answers.
CASES = [
    (name, called)
    for name, check in CHECKS.items()
    if name != "errors instead of wrong answers"
    for called in sorted(names_in(check.run))
]


def test_every_check_calls_lamina():
    assert {name for name, _ in CASES} == set(CHECKS) - {"errors instead of wrong answers"}


@pytest.mark.parametrize(("name", "called"), CASES)
def test_a_check_fails_where_what_it_calls_is_wrong(name, called, monkeypatch):
    check = CHECKS[name]
    monkeypatch.setattr(sys.modules[check.run.__module__], called, wrongly(called))
    assert failing(check)


# What breaks below the public functions: a rule, or the hook for functions of the user.


def wrong_batching(op):
    rule = RULES.lookup(op).function

    def wrong(*args, **kwargs):
        out, dims = rule(*args, **kwargs)
        return scaled(out), dims

    RULES.register(op, wrong, replace=True)


def wrong_slope(op):
    pointwise(op, lambda t: t * 1.5, replace=True)


BELOW = {
    "vmap": lambda: wrong_batching(aten.linear.default),
    "vmap, nested": lambda: wrong_batching(aten.dot.default),
    "grad": lambda: wrong_slope(aten.tanh.default),
    "per-example gradients": lambda: wrong_slope(aten.tanh.default),
    "jvp": lambda: wrong_slope(aten.sin.default),
    "jacrev": lambda: wrong_slope(aten.sin.default),
    "jacfwd": lambda: wrong_slope(aten.sin.default),
    "linearize": lambda: wrong_slope(aten.sin.default),
    "nested derivatives": lambda: wrong_slope(aten.sin.default),
    "checkpoints": lambda: wrong_slope(aten.cos.default),
    "elementwise ops": lambda: wrong_slope(aten.exp.default),
    "sorting and searching": lambda: wrong_batching(aten.topk.default),
}


@pytest.mark.parametrize("name", BELOW)
def test_a_check_fails_where_a_rule_is_wrong(name):
    with temporary_rules():
        BELOW[name]()
        assert failing(CHECKS[name])
    assert not failing(CHECKS[name])


def test_a_lost_backward_of_a_function_is_found(monkeypatch):
    usual = UserFunction.backward
    monkeypatch.setattr(UserFunction, "backward", lambda *args: [None] * len(usual(*args)))
    assert failing(CHECKS["autograd.Function"])
