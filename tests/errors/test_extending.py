"""What is said to those who extend Lamina, where something does not fit."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from lamina import grad, jvp, vmap
from lamina.extend import (
    HandlerInterpreter,
    Interpreter,
    LevelTensor,
    RuleInterpreter,
    batching_rule,
    constant,
    decomposition,
    jvp_rule,
    linear,
    multilinear,
    pointwise,
    temporary_rules,
    vjp_rule,
)
from lamina_core.errors import MissingRuleError, RuleError
from tests.errors.saying import said

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def scope():
    with temporary_rules():
        yield


@torch.library.custom_op("lamina_misused::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float, shift: float = 0.0) -> torch.Tensor:
    return x * factor + shift


@torch.library.custom_op("lamina_misused::both", mutates_args=())
def both(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + y, x * y


@torch.library.custom_op("lamina_misused::fill", mutates_args=("x",))
def fill(x: torch.Tensor) -> None:
    x.fill_(1)


X = torch.ones(2, 3)


# -- registration ----------------------------------------------------------------------------------


def test_another_signature():
    assert_expected_inline(
        said(RuleError, lambda: batching_rule(scaled)(lambda info, in_dims, x: (x, 0))),
        """\
a batching rule for lamina_misused.scaled.default cannot be called like the op
  called with those that have no default: too many positional arguments
  the op:   lamina_misused::scaled(Tensor x, float factor, float shift=0.) -> Tensor
  the rule: test_another_signature.<locals>.<lambda>.<locals>.<lambda>(info, in_dims, x)
  to fix: give it the parameters of the op, with their defaults, behind (info, in_dims)""",
    )


def test_a_rule_without_defaults():
    def rule(needs, x, factor, shift):
        return scaled(x, factor, shift), (), None

    assert_expected_inline(
        said(RuleError, lambda: vjp_rule(scaled)(rule)),
        """\
a vjp rule for lamina_misused.scaled.default cannot be called like the op
  called with those that have no default: missing a required argument: 'shift'
  the op:   lamina_misused::scaled(Tensor x, float factor, float shift=0.) -> Tensor
  the rule: test_a_rule_without_defaults.<locals>.rule(needs, x, factor, shift)
  to fix: give it the parameters of the op, with their defaults, behind (needs)""",
    )


@pytest.mark.parametrize(
    "register",
    [
        lambda rule: batching_rule(aten.sum.dim_IntList, replace=True)(rule),
        lambda rule: vjp_rule(aten.sum.dim_IntList, replace=True)(rule),
        lambda rule: jvp_rule(aten.sum.dim_IntList, replace=True)(rule),
        lambda rule: decomposition(aten.sum.dim_IntList)(rule),
    ],
    ids=["batching_rule", "vjp_rule", "jvp_rule", "decomposition"],
)
def test_a_keyword_that_the_op_has_and_the_rule_has_not(register):
    with pytest.raises(RuleError, match="cannot be called like the op"):
        register(lambda first, x, dim, keepdim=False: None)


def test_a_rule_that_is_no_function():
    assert_expected_inline(
        said(RuleError, lambda: vjp_rule(scaled)(3)),
        """\
a vjp rule for lamina_misused.scaled.default has to be a function
  got: int 3""",
    )


def test_a_rule_for_what_is_no_overload():
    assert_expected_inline(
        said(RuleError, lambda: batching_rule(torch.ops.lamina_misused.scaled)(lambda *a: a)),
        """\
a rule is registered for an overload of an op
  got: OpOverloadPacket scaled
  its overloads: default
  to fix: name the overload, such as torch.ops.aten.sum.dim_IntList""",
    )
    with pytest.raises(RuleError, match=r"got: builtin_function_or_method sin"):
        pointwise(torch.sin, lambda t: t)
    with pytest.raises(RuleError, match=r"got: str aten\.sin"):
        constant("aten.sin")


def test_a_second_rule():
    def rule(info, in_dims, x, factor, shift=0.0):
        return scaled(x, factor, shift), in_dims[0]

    batching_rule(scaled)(rule)
    assert_expected_inline(
        said(RuleError, lambda: batching_rule(scaled)(rule)),
        """\
a second batching rule for lamina_misused.scaled.default
  first owner: tests.errors.test_extending.test_a_second_rule.<locals>.rule
  second owner: tests.errors.test_extending.test_a_second_rule.<locals>.rule
  to fix: keep one of the two; lamina.extend takes replace=True""",
    )
    batching_rule(scaled, replace=True)(rule)


def test_a_rule_beside_that_of_torch_library():
    @torch.library.custom_op("lamina_misused::mapped", mutates_args=())
    def mapped(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    mapped.register_vmap(lambda info, in_dims, x: (x.clone(), in_dims[0]))
    assert_expected_inline(
        said(RuleError, lambda: batching_rule(mapped)(lambda info, in_dims, x: (x, 0))),
        """\
a second batching rule for lamina_misused.mapped.default
  first owner: torch.library.register_vmap
  to fix: keep one of the two""",
    )


def test_a_second_decomposition():
    decomposition(scaled)(lambda x, factor, shift=0.0: x * factor)
    with pytest.raises(RuleError, match="a second decomposition rule for lamina_misused"):
        decomposition(scaled)(lambda x, factor, shift=0.0: x * factor)
    with pytest.raises(RuleError, match=r"first owner: lamina\.decompose\.table\.dropout"):
        decomposition(aten.dropout.default)(lambda input, p, train: input)


def test_a_declaration_is_made_for_both_modes_or_for_none():
    @jvp_rule(scaled)
    def rule(tangents, x, factor, shift=0.0):
        return scaled(x, factor, shift), tangents[0] * factor

    with pytest.raises(RuleError, match="a second jvp rule"):
        linear(scaled, lambda ct, factor: ct * factor)
    vjp_rule(scaled)(lambda needs, x, factor, shift=0.0: (x, (), None))


def test_a_rule_for_an_op_that_writes():
    assert_expected_inline(
        said(RuleError, lambda: batching_rule(fill)(lambda info, in_dims, x: (x, 0))),
        """\
a batching rule for lamina_misused.fill.default, which writes to its arguments
  to fix: use torch.library.register_vmap, or define an op that returns what it computes""",
    )
    assert_expected_inline(
        said(RuleError, lambda: pointwise(aten.erfinv_.default, lambda t: t)),
        """\
a pointwise derivative for aten.erfinv_.default, which writes to its arguments
  to fix: register it for aten.erfinv.default, by which the write is interpreted""",
    )


def test_products_that_do_not_fit():
    assert_expected_inline(
        said(RuleError, lambda: pointwise(scaled, lambda t: t, lambda t: t)),
        """\
2 products for lamina_misused.scaled.default, which has 1 tensor operands
  to fix: give one for each, None for one without derivative""",
    )
    assert_expected_inline(
        said(RuleError, lambda: multilinear(both, lambda ct, y: ct)),
        """\
1 transposes for lamina_misused.both.default, which has 2 tensor operands
  to fix: give one for each""",
    )
    assert_expected_inline(
        said(RuleError, lambda: linear(scaled, lambda ct, scale: ct)),
        """\
a derivative of lamina_misused.scaled.default names 'scale', which is no argument of the op
  arguments of the op: x, factor, shift
  to fix: name one of these, or out, or an operand: x, y, z, w""",
    )
    with pytest.raises(RuleError, match="has to be a function of the cotangent"):
        linear(scaled, lambda: 1)
    with pytest.raises(RuleError, match=r"whose tensors are not all positional arguments"):
        linear(aten.cat.default, lambda ct: ct, replace=True)


# -- answers ---------------------------------------------------------------------------------------


def test_answers_of_a_batching_rule():
    answers = [X, (X,), (X, 5), ([X, X], (0,))]
    batching_rule(scaled)(lambda info, in_dims, x, factor, shift=0.0: answers[0])
    call = vmap(lambda x: scaled(x, 2.0))
    assert_expected_inline(
        said(RuleError, lambda: call(X)),
        """\
the vmap of lamina_misused.scaled.default returned Tensor
  while interpreting at level 1: vmap(batch_size=2, randomness='error')
  to fix: return a pair (output, out_dims)""",
    )
    answers.pop(0)
    with pytest.raises(RuleError, match="returned tuple"):
        call(X)
    answers.pop(0)
    with pytest.raises(RuleError, match=r"returned an output of shape \[2, 3\] with out_dims 5"):
        call(X)
    answers.pop(0)
    with pytest.raises(RuleError, match=r"returned 2 outputs and out_dims \(0,\)"):
        call(X)


def test_answers_of_derivatives():
    vjp_rule(scaled)(lambda needs, x, factor, shift=0.0: scaled(x, factor, shift))
    assert_expected_inline(
        said(RuleError, lambda: grad(lambda x: scaled(x, 2.0).sum())(X)),
        """\
the vjp rule of lamina_misused.scaled.default returned a Tensor
  the vjp rule: tests.errors.test_extending.test_answers_of_derivatives.<locals>.<lambda>
  to fix: return (out, residuals, pullback)""",
    )

    @vjp_rule(scaled, replace=True)
    def rule(needs, x, factor, shift=0.0):
        return scaled(x, factor, shift), (factor,), pullback

    def pullback(residuals, needs, ct):
        return ct

    assert_expected_inline(
        said(RuleError, lambda: grad(lambda x: scaled(x, 2.0).sum())(X)),
        """\
the pullback of lamina_misused.scaled.default returned a Tensor
  the pullback: tests.errors.test_extending.test_answers_of_derivatives.<locals>.pullback
  to fix: return a tuple with an entry for each of the 1 tensor operands""",
    )
    jvp_rule(scaled)(lambda tangents, x, factor, shift=0.0: x)
    assert_expected_inline(
        said(RuleError, lambda: jvp(lambda x: scaled(x, 2.0), (X,), (X,))),
        """\
the jvp rule of lamina_misused.scaled.default returned a Tensor
  the jvp rule: tests.errors.test_extending.test_answers_of_derivatives.<locals>.<lambda>
  to fix: return (out, out_t)""",
    )
    jvp_rule(both)(lambda tangents, x, y: (both(x, y), x))
    with pytest.raises(RuleError, match="to fix: return a tangent or None for each output"):
        jvp(both, (X, X), (X, X))


def test_a_call_left_to_no_parts():
    batching_rule(scaled)(lambda info, in_dims, x, factor, shift=0.0: NotImplemented)
    vjp_rule(scaled)(lambda needs, x, factor, shift=0.0: NotImplemented)
    jvp_rule(scaled)(lambda tangents, x, factor, shift=0.0: NotImplemented)
    assert_expected_inline(
        said(RuleError, lambda: vmap(lambda x: scaled(x, 2.0))(X)),
        """\
a rule of lamina_misused.scaled.default returned NotImplemented, and the op is not made of others
  the rule: tests.errors.test_extending.test_a_call_left_to_no_parts.<locals>.<lambda>
  to fix: give an answer in every case, or register a @decomposition""",
    )
    with pytest.raises(RuleError, match="returned NotImplemented"):
        grad(lambda x: scaled(x, 2.0).sum())(X)
    with pytest.raises(RuleError, match="returned NotImplemented"):
        jvp(lambda x: scaled(x, 2.0), (X,), (X,))
    decomposition(scaled)(lambda x, factor, shift=0.0: x * factor + shift)
    assert vmap(lambda x: scaled(x, 2.0))(X).eq(2).all()


# -- transforms ------------------------------------------------------------------------------------


class PairTensor(LevelTensor):
    __slots__ = ("other",)


def make(**members):
    given = {
        "wrapper": PairTensor,
        "transform": "pairs",
        "constant": lambda self, value: self.wrap(value, other=None),
        "is_constant": lambda self, x: x.other is None,
    }
    members = {name: member for name, member in (given | members).items() if member is not ...}
    return type("Pairs", (RuleInterpreter,), members)


def test_a_transform_that_lacks_something():
    assert_expected_inline(
        said(RuleError, lambda: make(wrapper=...)),
        """\
Pairs does not say its wrapper
  to fix: define wrapper in the class: its subclass of LevelTensor""",
    )
    assert_expected_inline(
        said(RuleError, lambda: make(wrapper=torch.Tensor)),
        """\
Pairs does not say its wrapper
  got: <class 'torch.Tensor'>
  to fix: define wrapper in the class: its subclass of LevelTensor""",
    )
    with pytest.raises(RuleError, match="Pairs does not say its transform"):
        make(transform=...)
    with pytest.raises(RuleError, match="Pairs does not say its is_constant"):
        make(is_constant=...)


def test_a_wrapper_without_its_value_or_its_fields():
    with make()() as level:
        assert_expected_inline(
            said(RuleError, lambda: level.wrap(X)),
            """\
PairTensor was to be made with no fields
  while interpreting at level 1: pairs
  its fields, the slots of the class: other
  to fix: give wrap() each of them by its name""",
        )
        assert_expected_inline(
            said(RuleError, lambda: level.wrap(3, other=X)),
            """\
PairTensor was to be made of something that is no tensor
  while interpreting at level 1: pairs
  got: int 3
  to fix: give wrap() a tensor of a lower level, which says shape, dtype and device""",
        )
        with pytest.raises(RuleError, match="made with another"):
            level.wrap(X, another=X)


def test_what_a_rule_of_a_transform_returns():
    kind = make()

    @kind.rule(aten.sin.default)
    def sin(level, x):
        return x.value.sin()

    with kind() as level:
        x = level.wrap(X, other=X)
        assert_expected_inline(
            said(RuleError, lambda: x.sin()),
            """\
the pairs rule of aten.sin.default returned a Tensor that is no wrapper of its level
  while interpreting at level 1: pairs
  the rule: tests.errors.test_extending.test_what_a_rule_of_a_transform_returns.<locals>.sin
  to fix: return level.wrap(...), or level.constant(...) for what is a constant""",
        )
        assert_expected_inline(
            said(MissingRuleError, lambda: x.cos()),
            """\
no pairs rule for aten.cos.default
  while interpreting at level 1: pairs
  registered overloads of the same op: none
  to fix: register one with @Pairs.rule, or write the function with other ops""",
        )


def test_a_rule_of_a_transform():
    kind = make()
    assert_expected_inline(
        said(RuleError, lambda: kind.rule(aten.add.Tensor)(lambda level, x, y: x)),
        """\
a rule of pairs for aten.add.Tensor cannot be called like the op
  called with all arguments: got an unexpected keyword argument 'alpha'
  the op:   aten::add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor
  the rule: test_a_rule_of_a_transform.<locals>.<lambda>.<locals>.<lambda>(level, x, y)
  to fix: give it the parameters of the op, with their defaults, behind (level)""",
    )
    with pytest.raises(RuleError, match=r"register it for aten\.add\.Tensor"):
        kind.rule(aten.add_.Tensor)(lambda level, x, y, *, alpha=1: x)
    kind.rule(aten.sin.default)(lambda level, x: x)
    with pytest.raises(RuleError, match=r"a second pairs rule for aten\.sin\.default"):
        kind.rule(aten.sin.default)(lambda level, x: x)


def test_a_constant_that_is_none():
    kind = make(constant=lambda self, value: value)
    kind.rule(aten.mul.Tensor)(lambda level, x, y: x)
    with kind() as level:
        x = level.wrap(X, other=X)
        assert_expected_inline(
            said(RuleError, lambda: x * X),
            """\
Pairs.constant returned a Tensor that is no wrapper of its level
  while interpreting at level 1: pairs
  to fix: return self.wrap(value, ...)""",
        )


def test_a_level_that_is_entered_twice():
    level = make()()
    with level:
        pass
    assert_expected_inline(
        said(RuleError, level.__enter__),
        """\
a level of pairs is entered a second time
  to fix: make one for each run: its wrappers end with it""",
    )


def test_interpreters_that_define_nothing():
    class Bare(Interpreter):
        wrapper = PairTensor

    class Handled(HandlerInterpreter):
        wrapper = PairTensor

    with Bare() as level:
        x = level.wrap(X, other=None)
        assert said(RuleError, lambda: x + 1) == "Bare has to define process(op, args, kwargs)"
        assert_expected_inline(
            said(RuleError, lambda: level.constant(X)),
            """\
Bare does not say what a constant is
  while interpreting at level 1: Bare
  to fix: define constant(self, value), which wraps a value from below""",
        )
    with Handled() as level, pytest.raises(RuleError, match=r"define resolve\(op\)"):
        level.wrap(X, other=None).sin()
