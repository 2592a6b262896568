"""`custom_vmap`: a function whose batched form the user gives, and the derivative of that form.

Where a level that differentiates stands above one that maps, the function goes down to the latter
as a whole (NOTE [Functions]). Its pullback is such a function again: unmapped it is the `vjp` of
the function, and mapped it is the `vjp` of the rule, with the arguments that are differentiated
batched. So is its pushforward.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lamina.autodiff.api import jvp, vjp
from lamina.custom.arguments import Arguments, Output, Signature, pair_of
from lamina_core import pytree
from lamina_core.errors import RuleError, StructureError, message
from lamina_core.function import Applied, Custom, Needs, apply_here
from lamina_core.user_function import Meta
from lamina_core.wrapper import LevelTensor, strip_dead

__all__ = ["custom_vmap"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor


class custom_vmap:
    """Give a function a batched form of its own.

    Under `vmap` the rule is called in place of the function, as code of the level below. As in JAX
    it gets the batch size, then for each argument a tree of bools (is this leaf batched?) and the
    arguments themselves, whose batched leaves have the batch dim in front. It returns
    `(output, out_batched)`, likewise. Derivatives are those of the rule where the function is
    mapped, and those of the function elsewhere.

    Args:
        fun: The function. It is called by position, with defaults filled in.

    Raises:
        RuleError: When it is mapped without a rule, or if the rule returns what does not fit.
        CapturedTensorError: If function or rule use a tensor of a transform inside the `vmap`
            that is not an argument.
        StructureError: If an argument cannot be given by position.

    Example:
        >>> import torch
        >>> from lamina import custom_vmap, grad, vmap
        >>> @custom_vmap
        ... def dot(x, w):
        ...     return x.dot(w)
        >>> @dot.def_vmap
        ... def rule(axis_size, in_batched, x, w):
        ...     x_batched, w_batched = in_batched
        ...     print("one product for", axis_size, "examples")
        ...     if x_batched and not w_batched:
        ...         return x @ w, True
        ...     return (x * w).sum(-1), True
        >>> vmap(dot, in_dims=(0, None))(torch.eye(2), torch.tensor([3.0, 4.0]))
        one product for 2 examples
        tensor([3., 4.])
    """

    def __init__(self, fun: Callable[..., Any]) -> None:
        functools.update_wrapper(self, fun)
        self.fun = fun
        self.signature = Signature(fun, (), ())
        self.rule: Callable[..., Any] | None = None
        self.linear_from: int | None = None  # which tensors it is linear in, if it is a derivative

    def def_vmap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Set the rule, and return it, so that this serves as a decorator.

        Args:
            rule: `(axis_size, in_batched, *args) -> (output, out_batched)`.
        """
        self.rule = rule
        return rule

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """The function as a method."""
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        call = Arguments(self.signature.bind(args, kwargs), ())
        if not any(_is_mapped(tensor) for tensor in call.tensors):
            return self.fun(*call.args)
        applied = _Call(self, call)
        tensors = tuple(call.tensors)
        call.forget()
        found = apply_here(applied, tensors)
        return applied.out.tree(found)


def _is_mapped(tensor: Any) -> bool:
    """Whether a tensor differs between the examples of an active vmap."""
    while type(tensor) in _CLASSES:
        interpreter = tensor.interpreter
        batches = interpreter.alive and not interpreter.differentiates
        if batches and not interpreter.is_constant(tensor):
            return not interpreter.opaque
        tensor = tensor.value
    return False


class _Call(Custom):
    """One call, as a function of the tensors of the arguments."""

    has_jvp = True

    def __init__(self, owner: custom_vmap, call: Arguments) -> None:
        self.name = owner.signature.name
        self.owner, self.call = owner, call
        self.ins = [Meta(tensor) for tensor in call.tensors]
        self.out = Output(())

    def _taken_apart(self, out: Any) -> list[Any]:
        """The tensors of an output, whose structure is kept."""
        self.out = Output(out)
        return self.out.forget()

    def run(self, tensors: Sequence[Any]) -> list[Any]:
        """The function: tensors to tensors."""
        return self._taken_apart(self.owner.fun(*self.call.placed(self.call.filled(tensors))))

    def run_mapped(
        self, size: int, batched: Sequence[bool], tensors: Sequence[Any]
    ) -> tuple[list[Any], list[bool]]:
        """The rule: tensors, the batch dim of batched ones in front, to such tensors."""
        call, name = self.call, self.name
        if self.owner.rule is None:
            raise RuleError(
                message(
                    f"{name} is a custom_vmap function without a rule, and it is mapped",
                    f"to fix: define it, with {name}.def_vmap(rule)",
                )
            )
        flags = call.tree(call.filled(batched, static=[False] * len(call.leaves)))
        answer = self.owner.rule(size, list(flags), *call.placed(call.filled(tensors)))
        who = f"the vmap rule of {name}"
        out, out_batched = pair_of(answer, who, "(output, out_batched)")
        found = [strip_dead(tensor) for tensor in self._taken_apart(out)]
        try:
            spread = pytree.broadcast_prefix(
                out_batched, self.out.spec, what="out_batched", of="output"
            )
        except StructureError as error:
            what, *lines = str(error).split("\n  ")
            raise RuleError(message(f"{who}: {what}", *lines)) from None
        wanted = [spread[place] for place in self.out.places]
        for tensor, flag in zip(found, wanted, strict=True):
            self._check(who, tensor, flag, size)
        return found, wanted

    def _check(self, who: str, tensor: Any, flag: Any, size: int) -> None:
        if not isinstance(flag, bool):
            raise RuleError(
                message(
                    f"{who} returned {flag!r} in out_batched",
                    "to fix: return True or False for each output",
                )
            )
        if flag and (tensor.dim() == 0 or tensor.shape[0] != size):
            raise RuleError(
                message(
                    f"{who} returned an output of shape {list(tensor.shape)} as batched",
                    f"expected: {size}, the batch size, in dim 0",
                    "to fix: move the batch dim to the front, or return False for it",
                )
            )

    # -- what the levels ask -----------------------------------------------------------------------

    @property
    def vmap_rule(self) -> Any:
        """The rule, as `torch.autograd.Function` has it."""

        def rule(info: Any, in_dims: Sequence[int | None], *tensors: Any) -> Any:
            moved = [
                t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims, strict=True)
            ]
            found, flags = self.run_mapped(
                info.batch_size, [dim is not None for dim in in_dims], moved
            )
            return tuple(found), tuple([0 if flag else None for flag in flags])

        return rule

    def set_up(self, args: tuple[Any, ...], out: Any, needs: Needs) -> Applied:
        """What the derivative needs: the arguments."""
        return Applied(list(out), tensors=args, sources=range(len(args)))

    def forward(self, args: tuple[Any, ...], needs: Needs) -> Applied:
        """The function, where no argument is mapped after all."""
        outs = [out.detach() for out in self.run(args)]
        return Applied(outs, tensors=args, sources=range(len(args)))

    def backward(
        self, tensors: Sequence[Any], rest: Any, needs: Needs, cts: Sequence[Any]
    ) -> list[Any]:
        """The pullback, another function with a rule."""
        wanted = [i for i, need in enumerate(needs) if need and self.ins[i].differentiable]
        live = [j for j, ct in enumerate(cts) if ct is not None]
        first = self.owner.linear_from
        if first is not None and all(i >= first for i in wanted):
            # They make no difference, and `linear_transpose` has no values of them.
            tensors = [*tensors[:first], *[torch.zeros_like(t) for t in tensors[first:]]]
        found = self._derived(_pulled, _pulled_mapped, wanted, live)(
            list(tensors), [cts[j] for j in live]
        )
        grads: list[Any] = [None] * len(needs)
        for i, ct in zip(wanted, found, strict=True):
            grads[i] = ct
        return grads

    def jvp(self, tensors: Sequence[Any], rest: Any, tangents: Sequence[Any]) -> list[Any]:
        """The pushforward, another function with a rule."""
        live = [i for i, tangent in enumerate(tangents) if tangent is not None]
        return list(
            self._derived(_pushed, _pushed_mapped, live, live)(
                list(tensors), [tangents[i] for i in live]
            )
        )

    def _derived(self, plain: Any, mapped: Any, wanted: list[int], live: list[int]) -> custom_vmap:
        derived = custom_vmap(functools.partial(plain, self, wanted, live))
        derived.signature.name = f"the derivative of {self.name}"
        derived.def_vmap(functools.partial(mapped, self, wanted, live))
        derived.linear_from = len(self.ins)
        return derived


# -- the derivatives of a call, of the function and of its rule ------------------------------------


def _replaced(tensors: Sequence[Any], wanted: Sequence[int], new: Sequence[Any]) -> list[Any]:
    found = list(tensors)
    for i, tensor in zip(wanted, new, strict=True):
        found[i] = tensor
    return found


def _front(tensor: Any, batched: bool, size: int) -> Any:
    """A tensor with the batch dim in front."""
    return tensor if batched else tensor.expand(size, *tensor.shape)


def _pulled(call: _Call, wanted: Any, live: Any, tensors: list[Any], cts: list[Any]) -> list[Any]:
    def run(*chosen: Any) -> list[Any]:
        outs = call.run(_replaced(tensors, wanted, chosen))
        return [outs[j] for j in live]

    _, pull = vjp(run, *[tensors[i] for i in wanted])
    return list(pull(cts))


def _pulled_mapped(
    call: _Call,
    wanted: Any,
    live: Any,
    size: int,
    in_batched: Any,
    tensors: list[Any],
    cts: list[Any],
) -> Any:
    batched, cts_batched = in_batched
    flags = [flag or i in wanted for i, flag in enumerate(batched)]

    def run(*chosen: Any) -> tuple[list[Any], list[bool]]:
        # An output that no example has for itself depends on nothing that is differentiated.
        outs, outs_batched = call.run_mapped(size, flags, _replaced(tensors, wanted, chosen))
        return [outs[j] for j in live if outs_batched[j]], outs_batched

    chosen = [_front(tensors[i], batched[i], size) for i in wanted]
    _, pull, outs_batched = vjp(run, *chosen, has_aux=True)
    pairs = zip(live, cts, cts_batched, strict=True)
    grads = pull([_front(ct, flag, size) for j, ct, flag in pairs if outs_batched[j]])
    return list(grads), True


def _pushed(
    call: _Call, wanted: Any, live: Any, tensors: list[Any], tangents: list[Any]
) -> list[Any]:
    def run(*chosen: Any) -> list[Any]:
        return call.run(_replaced(tensors, wanted, chosen))

    return list(jvp(run, [tensors[i] for i in wanted], tangents)[1])


def _pushed_mapped(
    call: _Call,
    wanted: Any,
    live: Any,
    size: int,
    in_batched: Any,
    tensors: list[Any],
    tangents: list[Any],
) -> Any:
    batched, ts_batched = in_batched
    either = dict(zip(wanted, ts_batched, strict=True))
    flags = [flag or either.get(i, False) for i, flag in enumerate(batched)]

    def run(*chosen: Any) -> tuple[list[Any], list[bool]]:
        return call.run_mapped(size, flags, _replaced(tensors, wanted, chosen))

    def whole(tensor: Any, i: int, flag: bool) -> Any:
        return _front(tensor, flag, size) if flags[i] else tensor

    primals = [whole(tensors[i], i, batched[i]) for i in wanted]
    given = [whole(t, i, either[i]) for t, i in zip(tangents, wanted, strict=True)]
    _, out_ts, outs_batched = jvp(run, primals, given, has_aux=True)
    return list(out_ts), outs_batched
