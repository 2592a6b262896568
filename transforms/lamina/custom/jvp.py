"""`custom_jvp`: a function whose forward derivative the user gives, and reverse mode with it.

The function runs once, on arguments that are constants everywhere. Its outputs get their derivative
at each level from the rule: forward mode runs it, reverse mode transposes it, which is linear in
the tangents. Either runs the rule on the values of the level below, and so computes the output
once more: nothing but arguments and outputs is kept until then.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lamina.autodiff.api import vjp
from lamina.custom.arguments import Arguments, Output, Signature, need_like, pair_of
from lamina.custom.levels import GROUND, constants, levels_of, need_made
from lamina.custom.randomness import Draws
from lamina.custom.zeros import filled, returned
from lamina_core import pytree
from lamina_core.errors import RuleError, StructureError, message
from lamina_core.function import Applied, Custom, Needs, apply_here
from lamina_core.user_function import Meta

__all__ = ["custom_jvp"]

Tensor = torch.Tensor


class custom_jvp:
    """Give a function a forward derivative of its own; reverse mode transposes it.

    The rule is a function as in JAX: it takes the arguments of the function and their tangents, as
    two tuples, and returns `(output, output_tangent)`. It has to be linear in the tangents. All are
    pytrees of anything: the tangent of a Python float is 0.0, that of anything else which is no
    floating-point or complex tensor is None. `vmap` maps the function and the rule, PyTorch's own
    autograd uses the rule as well, and higher derivatives are those of the rule, which therefore
    has to be made of differentiable ops.

    Args:
        fun: The function. It is called by position, with defaults filled in.
        nondiff_argnums: Positions of arguments that are handed on as they are: the rule gets them
            in front of the primals.
        nondiff_argnames: Names of such arguments.

    Raises:
        RuleError: When called without a rule, or if the rule returns what does not fit.
        CapturedTensorError: If the output depends on a tensor with a derivative that is not an
            argument.
        StructureError: If an argument cannot be given by position.

    Example:
        >>> import torch
        >>> from lamina import custom_jvp, grad, jvp
        >>> @custom_jvp
        ... def log1pexp(x):
        ...     return torch.log1p(x.exp())
        >>> @log1pexp.defjvp
        ... def rule(primals, tangents):
        ...     (x,), (x_t,) = primals, tangents
        ...     return log1pexp(x), x_t * torch.sigmoid(x)
        >>> grad(log1pexp)(torch.tensor(100.0))  # exp overflows, and would give nan
        tensor(1.)
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        nondiff_argnums: int | Sequence[int] = (),
        nondiff_argnames: str | Sequence[str] = (),
    ) -> None:
        functools.update_wrapper(self, fun)
        self.fun = fun
        self.signature = Signature(fun, nondiff_argnums, nondiff_argnames)
        self.rule: Callable[..., Any] | None = None
        self.by_argument: tuple[Callable[..., Any] | None, ...] | None = None
        self.symbolic_zeros = False

    def defjvp(self, jvp: Callable[..., Any], symbolic_zeros: bool = False) -> Callable[..., Any]:
        """Set the rule, and return it, so that this serves as a decorator.

        Args:
            jvp: `(*nondiff_args, primals, tangents) -> (output, output_tangent)`.
            symbolic_zeros: Whether zero tangents reach it as `SymbolicZero`.
        """
        self.rule, self.by_argument, self.symbolic_zeros = jvp, None, symbolic_zeros
        return jvp

    def defjvps(self, *jvps: Callable[..., Any] | None) -> None:
        """Set one rule for each argument; the tangent of the output is the sum of what they return.

        Args:
            *jvps: `(arg_tangent, output, *primals) -> output_tangent`, or None for an argument
                without a derivative.

        Raises:
            StructureError: If the function has arguments that are not differentiated.
        """
        if self.signature.nondiff:
            raise StructureError(
                message(
                    f"defjvps of {self.signature.name}, which has arguments that are not "
                    "differentiated",
                    "to fix: use defjvp",
                )
            )
        self.rule, self.by_argument = None, jvps

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """The function as a method."""
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        name = self.signature.name
        if self.rule is None and self.by_argument is None:
            raise RuleError(
                message(
                    f"{name} is a custom_jvp function without a rule",
                    f"to fix: define it, with {name}.defjvp(rule) or {name}.defjvps(*rules)",
                )
            )
        call = Arguments(self.signature.bind(args, kwargs), self.signature.nondiff)
        tensors = call.tensors
        if not levels_of(name, [t for t in tensors if Meta(t).differentiable]):
            return self.fun(*call.args)
        draws = Draws(tensors)
        given = constants(tensors, GROUND)
        out = Output(self.fun(*call.placed(call.filled(given))))
        need_made(name, {id(tensor) for tensor in given}, out.tensors)
        rule = _Rule(self, call, out, draws)
        call.forget()
        return out.tree(apply_here(rule, (*tensors, *out.forget())))


class _Rule(Custom):
    """One call, as a function of the tensors of the arguments and of the outputs."""

    has_jvp = True

    def __init__(self, owner: custom_jvp, call: Arguments, out: Output, draws: Draws) -> None:
        self.name = owner.signature.name
        self.owner, self.call, self.out, self.draws = owner, call, out, draws
        self.zeros = [0.0 if isinstance(leaf, float) else None for leaf in call.leaves]
        self.ins = [Meta(tensor) for tensor in call.tensors]
        self.metas = [Meta(tensor) for tensor in out.tensors]
        # The arguments, and the outputs for rules that go argument by argument.
        last = -1 - len(self.metas) if owner.by_argument is not None else -1
        self.sources = [*range(len(self.ins)), *range(-1, last, -1)]

    def forward(self, args: tuple[Any, ...], needs: Needs) -> Applied:
        """Give the outputs that have been computed."""
        # Not as views: PyTorch's autograd would refuse writes to what a function has viewed.
        outs = [out.detach() for out in args[len(self.ins) :]]
        tensors = [args[at] if at >= 0 else outs[-1 - at] for at in self.sources]
        return Applied(outs, tensors=tensors, sources=self.sources)

    def jvp(self, tensors: Sequence[Any], rest: Any, tangents: Sequence[Any]) -> list[Any]:
        """Run the rule."""
        count = len(self.ins)
        return self._pushed(tensors[:count], tensors[count:], tangents[:count])

    def backward(
        self, tensors: Sequence[Any], rest: Any, needs: Needs, cts: Sequence[Any]
    ) -> list[Any]:
        """Pull cotangents back through the rule, as a function of the tangents."""
        count = len(self.ins)
        primals, outs = tensors[:count], tensors[count:]
        wanted = [i for i in range(count) if needs[i] and self.ins[i].differentiable]
        live: list[int] = []

        def push(*given: Any) -> Any:
            tangents: list[Any] = [None] * count
            for i, tangent in zip(wanted, given, strict=True):
                tangents[i] = tangent
            found = self._pushed(primals, outs, tangents)
            live.extend(j for j, tangent in enumerate(found) if tangent is not None)
            return [found[j] for j in live]

        grads: list[Any] = [None] * len(needs)
        if wanted:
            _, pull = vjp(push, *[self.ins[i].zeros() for i in wanted])
            for i, ct in zip(wanted, pull([cts[j] for j in live]), strict=True):
                grads[i] = ct
        return grads

    def _pushed(
        self, primals: Sequence[Any], outs: Sequence[Any], tangents: Sequence[Any]
    ) -> list[Any]:
        """A tangent or None for each tensor of the output."""
        owner, call = self.owner, self.call
        leaves = call.filled(primals)
        pushed = call.filled(
            [
                filled(tangent, meta, symbolic=owner.symbolic_zeros)
                for tangent, meta in zip(tangents, self.ins, strict=True)
            ],
            static=self.zeros,
        )
        with self.draws.again():
            if owner.by_argument is not None:
                return self._summed(leaves, outs, pushed, tangents)
            rule: Any = owner.rule
            answer = rule(*call.nondiff, call.tree(leaves), call.tree(pushed))
        who = f"the jvp of {self.name}"
        out, out_t = pair_of(answer, who, "(output, output_tangent)")
        like = self.out.filled(self.metas, static=False)
        need_like(out, self.out.spec, like, who=who, what="outputs", of="the output of fun")
        return self._checked(out_t, who)

    def _summed(
        self, leaves: list[Any], outs: Sequence[Any], pushed: list[Any], tangents: Sequence[Any]
    ) -> list[Any]:
        """The sum of what the rules of the arguments give."""
        rules = self.owner.by_argument or ()
        args, arg_ts = self.call.tree(leaves), self.call.tree(pushed)
        if len(rules) != len(args):
            raise RuleError(
                message(
                    f"defjvps of {self.name} got {len(rules)} rules, but it is called with "
                    f"{len(args)} arguments",
                    "to fix: give one for each argument, None for one without a derivative",
                )
            )
        live = self.call.tree(
            self.call.filled([t is not None for t in tangents], static=[False] * len(leaves))
        )
        out = self.out.tree(outs)
        total: list[Any] = [None] * len(self.metas)
        for at, rule in enumerate(rules):
            if rule is None or not any(pytree.leaves(live[at])):
                continue
            who = f"jvp {at} of {self.name}"
            parts = self._checked(rule(arg_ts[at], out, *args), who)
            total = [
                part if known is None else known if part is None else known + part
                for known, part in zip(total, parts, strict=True)
            ]
        return total

    def _checked(self, out_t: Any, who: str) -> list[Any]:
        """A tangent or None for each tensor of the output."""
        like = [meta if meta.differentiable else None for meta in self.metas]
        found = need_like(
            pytree.tree_map(returned, out_t),
            self.out.spec,
            self.out.filled(like, static=False),
            who=who,
            what="tangents",
            of="the output",
        )
        return [found[place] for place in self.out.places]
