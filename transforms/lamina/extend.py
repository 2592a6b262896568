"""The door for those who add to Lamina: a rule for an op, a derivative, a wrapper, a transform.

Whatever is built with these names alone needs no private part, and nests with every transform in
any order. [docs/extending.md](../../docs/extending.md) goes through it with examples.

**An op of yours, or one that has no rule.** An op made by `torch.library.custom_op`, or an overload
such as `torch.ops.aten._int_mm.default`. What transforms do with it now says
`explain("aten._int_mm")`.

| declaration | for | says |
|---|---|---|
| `@batching_rule(op)` | `vmap` | what the op is for a batch; `dims` computes batch dims |
| `pointwise(op, ...)` | both modes | per operand, the tangent times the partial derivative |
| `linear(op, ...)`, `multilinear(op, ...)` | both modes | the transpose, in one operand or each |
| `@vjp_rule(op)`, `@jvp_rule(op)` | a mode each | any other derivative, by hand |
| `constant(op)` | both modes | that there is none |
| `@decomposition(op)` | every transform | other ops to run in its place |

`unbroadcast(ct, shape)` is for pullbacks of ops that broadcast. `temporary_rules()` takes back what
a block has registered. The rules that ops bring from `torch.library` (`register_vmap`,
`register_autograd`) are used too; those given here hold at every level and to every order.

**A transform.** Three things: a subclass of `LevelTensor`, the *wrapper* that stands for a value
while the function runs; a subclass of `RuleInterpreter`, whose instances are *levels*; and rules.
Inside `with MyInterpreter() as level:` every op on a wrapper of the level arrives at a rule, which
calls torch on what the wrappers hold: values of the level below, which may be plain tensors or
wrappers of another transform. That is all there is to nesting. Here is one that bounds rounding
errors: each tensor holds how far it may be off.

    >>> import torch
    >>> from lamina import vmap
    >>> from lamina.extend import LevelTensor, RuleInterpreter
    >>> aten = torch.ops.aten
    >>> class Measured(LevelTensor):
    ...     __slots__ = ("error",)
    >>> class Errors(RuleInterpreter):
    ...     wrapper, transform = Measured, "errors"
    ...
    ...     def constant(self, value):  # what does not depend on what is transformed
    ...         return self.wrap(value, error=None)
    ...
    ...     def is_constant(self, wrapper):
    ...         return wrapper.error is None
    >>> def error_of(x):
    ...     return 0.0 if x.error is None else x.error
    >>> @Errors.rule(aten.add.Tensor)
    ... def add(level, x, y, *, alpha=1):
    ...     error = error_of(x) + abs(alpha) * error_of(y)
    ...     return level.wrap(torch.add(x.value, y.value, alpha=alpha), error=error)
    >>> @Errors.rule(aten.mul.Tensor)
    ... def mul(level, x, y):
    ...     dx, dy = error_of(x), error_of(y)
    ...     return level.wrap(
    ...         x.value * y.value, error=x.value.abs() * dy + y.value.abs() * dx + dx * dy
    ...     )
    >>> def with_error(f):
    ...     def run(x, error):
    ...         with Errors() as level:
    ...             out = level.results(f(level.wrap(x, error=error)))
    ...         return out.value, error_of(out)
    ...
    ...     return run
    >>> with_error(lambda x: x * x + x)(torch.tensor(3.0), torch.tensor(0.5))
    (tensor(12.), tensor(3.7500))
    >>> vmap(with_error(lambda x: x * x))(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]))
    (tensor([1., 4.]), tensor([1.2500, 2.2500]))

What a level of rules sees to by itself: constants and captured tensors; views and in-place writes,
so that a rule only ever sees the out-of-place form of an op; composite ops, which are run as their
parts; the user's own autograd; `autograd.Function` and `lamina.custom_vjp`, which are run as what
they compute; and errors for what has no rule.

**Below that.** `HandlerInterpreter` finds a handler `(level, op, args, kwargs)` for each op by a
`resolve` of its own, and `Interpreter` has nothing but `process(op, args, kwargs)`: for transforms
that are no table of rules. They use what rules are made of:

| name | is |
|---|---|
| `facts(op)` | what the schema of an op says: where tensors are, is it a view, does it write |
| `lower(level, op, args, kwargs)` | runs an op at the level below |
| `pass_down(level, op, args, kwargs)` | the same, if no argument is a wrapper of the level |
| `run_at(level)` | runs a block as the user's code of a level, `run_at(None)` of none |
| `mutate`, `record_views`, `refresh_all` | in-place ops, views, and views after writes |
| `watched`, `needs_guard` | plain tensors that the user's own autograd follows |
| `tensors_in`, `map_tensors`, `strip_dead`, `level_of` | the arguments of an op |
| `box`, `make_wrapper` | a wrapper without any of the fields set |
| `RuleTable` | rules by overload |
| `applying(kind)` | registers what a transform does with an `autograd.Function`: with a `Custom` |
| `apply_custom`, `Applied` | applies a `Custom` to values of the level below; what that gives |
| `pytree` | nested containers, taken apart and put together |
| `aten`, `overloads` | ops of which the running torch may lack some |
| `explain`, `print_stack`, `trace_log` | what happens |

With `LAMINA_DEBUG=1` the answers of all rules are checked; errors of an extension are those of
`lamina_core.errors`, raised with `level.error(kind, what, *lines)`.
"""

from lamina.autodiff.declare import unbroadcast
from lamina.batching import dims
from lamina.extending.batching import batching_rule
from lamina.extending.derivatives import (
    constant,
    jvp_rule,
    linear,
    multilinear,
    pointwise,
    vjp_rule,
)
from lamina.extending.everywhere import decomposition, temporary_rules
from lamina.extending.levels import RuleInterpreter
from lamina_core import pytree
from lamina_core.alias import mutate
from lamina_core.debug import explain, print_stack, trace_log
from lamina_core.dispatch import lower, pass_down, watched
from lamina_core.function import Applied, Custom, apply_custom, applying
from lamina_core.handlers import HandlerInterpreter
from lamina_core.interpreter import Interpreter
from lamina_core.overloads import aten, overloads
from lamina_core.rules import RuleTable
from lamina_core.schema import facts
from lamina_core.scopes import run_at
from lamina_core.tensors import map_tensors, needs_guard, tensors_in
from lamina_core.torch_hooks.tensors import make_wrapper
from lamina_core.views import record_views, refresh_all
from lamina_core.wrapper import LevelTensor, box, level_of, strip_dead

__all__ = [
    "Applied",
    "Custom",
    "HandlerInterpreter",
    "Interpreter",
    "LevelTensor",
    "RuleInterpreter",
    "RuleTable",
    "apply_custom",
    "applying",
    "aten",
    "batching_rule",
    "box",
    "constant",
    "decomposition",
    "dims",
    "explain",
    "facts",
    "jvp_rule",
    "level_of",
    "linear",
    "lower",
    "make_wrapper",
    "map_tensors",
    "multilinear",
    "mutate",
    "needs_guard",
    "overloads",
    "pass_down",
    "pointwise",
    "print_stack",
    "pytree",
    "record_views",
    "refresh_all",
    "run_at",
    "strip_dead",
    "temporary_rules",
    "tensors_in",
    "trace_log",
    "unbroadcast",
    "vjp_rule",
    "watched",
]
