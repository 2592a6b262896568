"""`custom_vjp`: a function whose reverse derivative the user gives.

# NOTE [Rules of the user's at many levels]
The derivative of the output is the user's rule at every level, that of the residuals is what their
ops say. So `fwd` runs once, as code of the present level, on arguments that are constants at the
innermost level that differentiates them (it needs no tape for `fwd`: that is what the rule is for)
and whatever they are elsewhere. Its outputs and residuals then go down the levels as arguments of
one call (NOTE [Functions]) that gives the outputs new places on all tapes.
PyTorch's own autograd, when it is the innermost, does not say beforehand whether there will be a
second derivative. Residuals are then computed again, from the arguments, by a backward that is
recorded itself.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lamina.custom.arguments import Arguments, Output, Signature, need_like, pair_of
from lamina.custom.levels import (
    GROUND,
    constants,
    derivative_levels,
    levels_of,
    need_made,
    watching,
)
from lamina.custom.randomness import Draws
from lamina.custom.zeros import Primal, filled, returned
from lamina_core import pytree
from lamina_core.errors import RuleError, message
from lamina_core.function import Applied, Custom, Needs, apply_here
from lamina_core.user_function import Meta

__all__ = ["custom_vjp"]

Tensor = torch.Tensor


class custom_vjp:
    """Give a function a reverse derivative of its own.

    The rule is two functions, as in JAX. `fwd` takes the arguments of the function and returns
    `(output, residuals)`; `bwd` takes the residuals and the cotangent of the output, and returns a
    tuple with a cotangent for each argument, of its structure. None stands for zero, for a leaf, a
    subtree or an argument. All are pytrees of anything; what is no floating-point or complex tensor
    has no derivative, and whatever `bwd` returns for it is ignored.

    The function itself runs where nothing is differentiated. `jvp` transposes `bwd`, which has to
    be linear in the cotangent, and `vmap` maps all three functions. PyTorch's own autograd uses the
    rule as well. The output has the rule's derivative at every level; a second derivative is that
    of `fwd` and `bwd`, which therefore have to be made of differentiable ops.

    Args:
        fun: The function. It is called by position, with defaults filled in.
        nondiff_argnums: Positions of arguments that are handed on as they are: `fwd` gets them in
            their places, `bwd` in front of the residuals.
        nondiff_argnames: Names of such arguments.

    Raises:
        RuleError: When called without `defvjp`, or if a rule returns what does not fit.
        CapturedTensorError: If `fwd` uses a tensor with a derivative that is not an argument.
        StructureError: If an argument cannot be given by position.

    Example:
        >>> import torch
        >>> from lamina import custom_vjp, grad
        >>> @custom_vjp
        ... def clipped(x, limit):
        ...     return x.clone()
        >>> clipped.defvjp(
        ...     lambda x, limit: (x.clone(), limit),
        ...     lambda limit, ct: (ct.clamp(-limit, limit), None),
        ... )
        >>> grad(lambda x: (10 * clipped(x, 1.0)).sum())(torch.ones(2))
        tensor([1., 1.])
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
        self.fwd: Callable[..., Any] | None = None
        self.bwd: Callable[..., Any] | None = None
        self.symbolic_zeros = False

    def defvjp(
        self, fwd: Callable[..., Any], bwd: Callable[..., Any], symbolic_zeros: bool = False
    ) -> None:
        """Set the rule.

        Args:
            fwd: `(*args) -> (output, residuals)`.
            bwd: `(*nondiff_args, residuals, output_ct) -> (arg_ct, ...)`.
            symbolic_zeros: Whether `fwd` gets an object with `.value` and `.perturbed` for each
                leaf of the differentiated arguments, and `bwd` a `SymbolicZero` for a zero.
        """
        self.fwd, self.bwd, self.symbolic_zeros = fwd, bwd, symbolic_zeros

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """The function as a method."""
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        name = self.signature.name
        if self.fwd is None or self.bwd is None:
            raise RuleError(
                message(
                    f"{name} is a custom_vjp function without a rule",
                    f"to fix: define it, with {name}.defvjp(fwd, bwd)",
                )
            )
        call = Arguments(self.signature.bind(args, kwargs), self.signature.nondiff)
        tensors = call.tensors
        levels = levels_of(name, [t for t in tensors if Meta(t).differentiable])
        if not levels:
            return self.fun(*call.args)
        draws = Draws(tensors) if levels[0] is GROUND else None
        given = constants(tensors, levels[0])
        fwd = _Forward(self, call)
        with watching(fwd.name, given) as made:
            out, residuals = fwd(given)
        need_made(fwd.name, made, (*out.tensors, *residuals.tensors))
        rule = _Rule(fwd, out, residuals, given, draws)
        extra = [*out.forget(), *residuals.forget()]
        call.forget()
        return out.tree(apply_here(rule, (*tensors, *extra)))


class _Forward:
    """The `fwd` of one call, as a function of tensors."""

    def __init__(self, owner: custom_vjp, call: Arguments) -> None:
        self.owner = owner
        self.call = call
        self.name = f"the fwd of {owner.signature.name}"
        self.perturbed = [False] * len(call.leaves)
        if owner.symbolic_zeros:
            for place in call.places:
                leaf = call.leaves[place]
                self.perturbed[place] = Meta(leaf).differentiable and bool(derivative_levels(leaf))

    def __call__(self, tensors: Sequence[Any]) -> tuple[Output, Output]:
        """The output and the residuals."""
        leaves = self.call.filled(tensors)
        if self.owner.symbolic_zeros:
            leaves = [Primal(*pair) for pair in zip(leaves, self.perturbed, strict=True)]
        fwd: Any = self.owner.fwd
        answer = fwd(*self.call.placed(leaves))
        out, residuals = pair_of(answer, self.name, "(output, residuals)")
        return Output(out), Output(residuals)


class _Rule(Custom):
    """One call, as a function of the tensors of the arguments, the output and the residuals.

    Attributes:
        sources: Where each tensor of the residuals comes from: the position of an argument of this
            call, or `-1 - j` for output j.
        saved: Which of these are kept.
    """

    def __init__(
        self,
        fwd: _Forward,
        out: Output,
        residuals: Output,
        given: Sequence[Any],
        draws: Draws | None,
    ) -> None:
        self.name = fwd.owner.signature.name
        self.fwd, self.out, self.residuals = fwd, out, residuals
        self.ins = [Meta(tensor) for tensor in given]
        self.metas = [Meta(tensor) for tensor in out.tensors]
        known = {id(tensor): i for i, tensor in enumerate(given)}
        for j, tensor in enumerate(out.tensors):
            known.setdefault(id(tensor), -1 - j)
        first = len(given) + len(out.tensors)
        for k, tensor in enumerate(residuals.tensors):
            known.setdefault(id(tensor), first + k)
        self.sources = [known[id(tensor)] for tensor in residuals.tensors]
        saved = set(self.sources)
        self.draws = draws if any(source >= first for source in saved) else None
        if self.draws is not None:
            saved |= set(range(len(given)))
        self.saved = sorted(saved)

    def forward(self, args: tuple[Any, ...], needs: Needs) -> Applied:
        """Give the outputs that have been computed."""
        first = len(self.ins)
        # Not as views: PyTorch's autograd would refuse writes to what a function has viewed.
        outs = [out.detach() for out in args[first : first + len(self.metas)]]
        tensors = [args[at] if at >= 0 else outs[-1 - at] for at in self.saved]
        return Applied(outs, tensors=tensors, sources=self.saved)

    def backward(
        self, tensors: Sequence[Any], rest: Any, needs: Needs, cts: Sequence[Any]
    ) -> list[Any]:
        """Run the user's bwd."""
        saved = dict(zip(self.saved, tensors, strict=True))
        owner, call = self.fwd.owner, self.fwd.call
        if self.draws is not None and torch.is_grad_enabled():
            with self.draws.again():
                _, again = self.fwd([saved[i] for i in range(len(self.ins))])
            residuals = again.tree(again.tensors)
        else:
            residuals = self.residuals.tree([saved[source] for source in self.sources])
        given = [
            filled(ct, meta, symbolic=owner.symbolic_zeros)
            for ct, meta in zip(cts, self.metas, strict=True)
        ]
        out_ct = pytree.unflatten(self.out.spec, self.out.filled(given, static=False))
        bwd: Any = owner.bwd
        found = self._checked(bwd(*call.nondiff, residuals, out_ct))
        wanted: list[Any] = [None] * len(needs)
        for i, ct in enumerate(found):
            wanted[i] = ct if needs[i] else None
        return wanted

    def _checked(self, answer: Any) -> list[Any]:
        """A cotangent or None for each tensor of the arguments."""
        who = f"the bwd of {self.name}"
        call = self.fwd.call
        count = call.spec.num_children
        if not isinstance(answer, (tuple, list)) or len(answer) != count:
            got = type(answer).__name__
            if isinstance(answer, (tuple, list)):
                got += f" of {len(answer)}"
            raise RuleError(
                message(
                    f"{who} returned a {got}",
                    f"expected: a tuple of {count}, one cotangent for each differentiated argument",
                    "to fix: return such a tuple, with None for an argument without one",
                )
            )
        like: list[Any] = [None] * len(call.leaves)
        for place, meta in zip(call.places, self.ins, strict=True):
            like[place] = meta if meta.differentiable else None
        cts = need_like(
            pytree.tree_map(returned, tuple(answer)),
            call.spec,
            like,
            who=who,
            what="cotangents",
            of="the arguments",
        )
        return [cts[place] for place in call.places]
