"""`torch.autograd.Function` under `jvp`: its own jvp, or the transpose of its backward.

# NOTE [Once differentiable]
A backward marked with `@once_differentiable` promises nothing of its derivatives, but it is linear
in the cotangents, and so has a transpose in them: the jvp. It is taken by `linear_transpose`, which
writes down every op on a cotangent, whatever the grad mode, and refuses one that is not linear or
reads a value. What a kernel or numpy does with a cotangent is thus an error, and never a zero.
The jvp is a function of its own to the levels below (`_Pushed`), linear in the tangents. Its
derivative in anything else is the second derivative that the mark forbids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lamina.autodiff.checks import is_differentiable
from lamina.autodiff.forward import ForwardInterpreter
from lamina.autodiff.function import values_of
from lamina.autodiff.linear_transpose import linear_transpose
from lamina_core.errors import (
    DataDependentError,
    NotDifferentiableError,
    NotLinearError,
    message,
)
from lamina_core.function import Applied, Custom, Needs, apply_custom, applying
from lamina_core.scopes import asleep, run_at
from lamina_core.user_function import Meta, differentiated_twice
from lamina_core.wrapper import strip_dead

__all__: list[str] = []

Tensor = torch.Tensor


@applying(ForwardInterpreter)
def _apply_jvp(interpreter: Any, custom: Custom, args: tuple[Any, ...], needs: Needs) -> Applied:
    """Hand a function down, and push the tangents through it."""
    tangents = [arg.tangent if interpreter.is_own(arg) else None for arg in args]
    if not interpreter.tracking():
        tangents = [None] * len(args)
    mine = tuple([tangent is not None for tangent in tangents])
    below = tuple([need or own for need, own in zip(needs, mine, strict=True)])
    values = values_of(interpreter, args)
    applied = apply_custom(custom, values, below)
    out_ts: list[Any] = [None] * len(applied.outs)
    if any(mine):
        with asleep(interpreter, custom.name), run_at(interpreter.below):
            if custom.has_jvp:
                out_ts = custom.jvp(applied.tensors, applied.rest, tangents)
            elif custom.once:
                out_ts = _pushed_once(custom, applied, values, tangents)
            else:
                out_ts = _transposed(custom, applied, mine, tangents)
            out_ts = [strip_dead(out_t) for out_t in out_ts]
    outs = []
    for i, (out, out_t) in enumerate(zip(applied.outs, out_ts, strict=True)):
        if isinstance(out, Tensor):
            wrapped = interpreter.constant(out)
            if out_t is not None and is_differentiable(out) and i not in applied.constant:
                wrapped.tangent = out_t
            out = wrapped
        outs.append(out)
    return applied.lifted(args, outs)


def _transposed(
    custom: Custom, applied: Applied, mine: Needs, tangents: Sequence[Any]
) -> list[Any]:
    """J t as the transpose of ct -> J^T ct, which is linear: pull t back through the backward."""
    outs = _metas(applied)
    if all(meta is None for meta in outs):
        return [None] * len(outs)

    def pulled_back(cts: Sequence[Any]) -> Any:
        return custom.backward(applied.tensors, applied.rest, mine, cts)

    given = [tangent for tangent, own in zip(tangents, mine, strict=True) if own]
    try:
        return _push(pulled_back, outs, mine, given)
    except (NotLinearError, DataDependentError) as error:
        raise _closed(custom.name, "its backward", error) from error


def _metas(applied: Applied) -> list[Meta | None]:
    """The shapes of the outputs of a function; None for one without a derivative."""
    return [
        Meta(out) if is_differentiable(out) and i not in applied.constant else None
        for i, out in enumerate(applied.outs)
    ]


def _push(
    pulled_back: Callable[[Sequence[Any]], Any],
    outs: Sequence[Meta | None],
    mine: Needs,
    tangents: Sequence[Any],
) -> list[Any]:
    """Tangents of outputs, by the transpose of what pulls their cotangents back.

    Args:
        pulled_back: Takes a cotangent for each output; gives one for each argument, or None.
        outs: The shapes of the outputs; None for one without a derivative.
        mine: Which arguments have a tangent.
        tangents: Of those.
    """
    live: list[Any] = []

    def pull(*given: Any) -> list[Any]:
        cts = iter(given)
        found = pulled_back([meta and next(cts) for meta in outs])
        wanted = [ct for ct, own in zip(found, mine, strict=True) if own]
        live.extend([ct is not None for ct in wanted])
        return [ct for ct in wanted if ct is not None]

    zeros = [meta.zeros() for meta in outs if meta is not None]
    with torch.enable_grad():
        transposed = linear_transpose(pull, *zeros)
    seeds = [_conjugate(t) for t, wanted in zip(tangents, live, strict=True) if wanted]
    found = iter(transposed(seeds))
    return [None if meta is None else _conjugate(next(found)) for meta in outs]


def _closed(name: str, backward: str, error: Exception) -> NotDifferentiableError:
    reason, _, _ = str(error).partition("\n")
    return NotDifferentiableError(
        message(
            f"the jvp of {name} could not be made of {backward}",
            f"jvp transposes it in the cotangents, and met {type(error).__name__}: {reason}",
            f"to fix: define jvp in {name}, or write its backward with torch ops that are "
            "linear in the cotangents",
        )
    )


# -- a backward that may not be differentiated -----------------------------------------------------


def _pushed_once(
    custom: Custom, applied: Applied, values: Sequence[Any], tangents: Sequence[Any]
) -> list[Any]:
    pushed = _Pushed(custom, applied, tangents)
    if all(meta is None for meta in pushed.outs):
        return [None] * len(pushed.outs)
    # The arguments are not read. By them a level below finds out that the result depends on them,
    # also where the function has saved intermediate values in their place.
    args = (
        *[tangent for tangent in tangents if tangent is not None],
        *applied.tensors,
        *[value for value in values if isinstance(value, Tensor)],
    )
    return apply_custom(pushed, args, (False,) * len(args)).outs


class _Pushed(Custom):
    """See NOTE [Once differentiable]: tangents, what is saved, arguments -> tangents.

    Attributes:
        custom: The function.
        rest: What its backward needs besides tensors.
        mine: Which of its arguments have a tangent.
        count: How many tensors it has saved.
        outs: The shapes of its outputs; None for one without a derivative.
    """

    has_jvp = True

    def __init__(self, custom: Custom, applied: Applied, tangents: Sequence[Any]) -> None:
        self.name = f"the jvp of {custom.name}"
        self.custom = custom
        self.rest = applied.rest
        self.mine = tuple([tangent is not None for tangent in tangents])
        self.count = len(applied.tensors)
        self.outs = _metas(applied)

    def _taken_apart(self, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """The tangents, and what the function has saved."""
        first = sum(self.mine)
        return args[:first], args[first : first + self.count]

    def forward(self, args: tuple[Any, ...], needs: Needs) -> Applied:
        """Transpose the backward in the cotangents."""
        tangents, saved = self._taken_apart(args)
        opened = self.custom.opened()

        def pulled_back(cts: Sequence[Any]) -> Any:
            return opened.backward(saved, self.rest, self.mine, cts)

        try:
            outs = _push(pulled_back, self.outs, self.mine, tangents)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            mark = "its backward, which is marked with @once_differentiable"
            raise _closed(self.custom.name, mark, error) from error
        return Applied(outs, tensors=args, sources=range(len(args)))

    def _refuse(self, flags: Sequence[bool]) -> None:
        """Raise unless derivatives are asked for in tangents alone."""
        if any(flags[sum(self.mine) :]):
            raise differentiated_twice(f"the backward of {self.custom.name}")

    def backward(
        self, tensors: Sequence[Any], rest: Any, needs: Needs, cts: Sequence[Any]
    ) -> list[Any]:
        """The backward of the function: the transpose of the transpose."""
        self._refuse(needs)
        tangents, saved = self._taken_apart(tensors)
        found = self.custom.backward(saved, self.rest, self.mine, cts)
        wanted = [ct for ct, own in zip(found, self.mine, strict=True) if own]
        return [*wanted, *[None] * (len(tensors) - len(tangents))]

    def jvp(self, tensors: Sequence[Any], rest: Any, tangents: Sequence[Any]) -> list[Any]:
        """It is linear in the tangents."""
        self._refuse([tangent is not None for tangent in tangents])
        first = sum(self.mine)
        filled = [
            torch.zeros_like(tensor) if tangent is None else tangent
            for tensor, tangent in zip(tensors[:first], tangents[:first], strict=True)
        ]
        args = (*filled, *tensors[first:])
        return apply_custom(self, args, (False,) * len(args)).outs


def _conjugate(tensor: Any) -> Any:
    """Between the transpose and the conjugate transpose, of which pullbacks are made."""
    return torch.conj_physical(tensor) if tensor.is_complex() else tensor
