"""Borrowed derivatives: PyTorch's own formula for the ops that have no rule here.

The op is run once on `LeafTensor`s: wrappers with C++ autograd switched on, whose ops are lowered
to the values inside. That records PyTorch's formula for this one op; pulling a cotangent back is
`torch.autograd.grad` through it, every op of which is lowered again. So it composes with every
level below, at 60-150 us a call.

Under saved-tensor hooks the node's residuals are what the formula saved, so hooks get those as they
get the residuals of a rule. The formula of an op from outside PyTorch may also keep tensors where
no hook is asked; its graph stays whole.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.autodiff import saved as _saved
from lamina.autodiff.leaf import Home, LeafTensor, unbox
from lamina.autodiff.operands import is_known
from lamina.autodiff.saved import SavedApart, without_hooks
from lamina_core.errors import NotDifferentiableError, message
from lamina_core.mode import mode_off
from lamina_core.overloads import aten
from lamina_core.schema import OpFacts
from lamina_core.tensors import map_tensors
from lamina_core.torch_hooks.autograd import forward_enabled
from lamina_core.wrapper import LevelTensor

__all__ = ["borrowed_jvp", "borrowed_vjp"]

Tensor = torch.Tensor


def _rrelu(
    x: Any,
    noise: Any,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Any:
    """[*S] -> ([*S], [*S]); PyTorch's own formula reads the noise from before the draw."""
    if not training or x.numel() == 0:  # nothing is drawn, so vmap need not be told how
        return torch.where(x > 0, x, x * ((lower + upper) / 2)), noise.clone()
    op = aten.rrelu_with_noise_functional.default
    _, drawn = op(x.detach(), noise, lower, upper, training, generator)
    return x * drawn, drawn


class _Dirichlet(torch.autograd.Function):
    """[*, n] -> [*, n]. PyTorch has this formula outside of the op, in `torch.distributions`."""

    @staticmethod
    def forward(ctx: Any, concentration: Any, generator: Any = None) -> Any:
        """Draw at the level below."""
        x = aten._sample_dirichlet.default(concentration, generator)
        ctx.save_for_backward(x, concentration)
        return x

    @staticmethod
    def backward(ctx: Any, ct: Any) -> Any:
        """The part of each, less what keeps the sum at 1."""
        x, concentration = ctx.saved_tensors
        total = concentration.sum(-1, True).expand_as(concentration)
        moved = aten._dirichlet_grad.default(x, concentration, total)
        return moved * (ct - (x * ct).sum(-1, True)), None


# What is run in place of an op.
_INSTEAD: dict[Any, Any] = {
    aten._sample_dirichlet.default: lambda x, generator=None: _Dirichlet.apply(x, generator),
    aten.rrelu_with_noise_functional.default: _rrelu,
}

# Forward formulas that are not to be trusted: they read an LU factorisation as a constant, which is
# wrong at second order.
_NO_FORWARD = frozenset((aten._linalg_slogdet.default,))


def _wrap_operands(home: Home, known: OpFacts, needs: Any, args: Any, kwargs: Any) -> Any:
    """Arguments with every tensor boxed, and the list of boxed operands in schema order."""
    leaves: list[Any] = []
    position = iter(needs)

    def box(value: Any) -> Any:
        wanted = next(position)
        if not isinstance(value, Tensor):
            leaves.append(None)
            return value
        wanted = wanted and (value.is_floating_point() or value.is_complex())
        leaf = home.wrap(value, requires_grad=wanted)
        leaves.append(leaf if wanted else None)
        return leaf

    boxed = list(args)
    for at in known.tensor_args:
        if at < len(boxed):
            boxed[at] = box(boxed[at])
        else:
            box(None)
    for at in known.list_args:
        if at < len(boxed) and boxed[at] is not None:
            boxed[at] = [box(item) for item in boxed[at]]
    inner = dict(kwargs)
    for name in known.tensor_kwargs:
        value = inner.get(name)
        if isinstance(value, (list, tuple)):
            inner[name] = [box(item) for item in value]
        else:
            inner[name] = box(value)
    return boxed, inner, leaves


def borrowed_vjp(interpreter: Any, known: OpFacts, needs: Any, args: Any, kwargs: Any) -> Any:
    """Run an op with PyTorch's formula recorded: `(out, residuals, pullback)` as a rule gives."""
    home = Home(interpreter)
    boxed, inner, leaves = _wrap_operands(home, known, needs, args, kwargs)
    op = _INSTEAD.get(known.op, known.op)
    apart = SavedApart() if _saved.active and known.op.namespace == "aten" else None
    with home.open(), torch.enable_grad(), apart.recording() if apart else without_hooks():
        out = op(*boxed, **inner)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    values = map_tensors(unbox, out)
    if not is_known(known.op) and any(_is_differentiable(o) for o in outs):
        return values, (known.name, interpreter.where()), _missing_pullback
    if not any(isinstance(o, Tensor) and o.requires_grad for o in outs):
        return values, (), None
    if apart is None:
        return values, (home, known.name, outs, leaves), _borrowed_pullback
    return values, (_Apart(home, known.name, outs, leaves, apart), apart.taken()), _apart_pullback


class _Apart:
    """A formula whose tensors are elsewhere: among the residuals, in the order they were saved."""

    __slots__ = ("followed", "home", "leaves", "name", "outs", "saved")

    def __init__(self, home: Home, name: str, outs: Any, leaves: Any, saved: SavedApart) -> None:
        self.home, self.name, self.outs, self.leaves, self.saved = home, name, outs, leaves, saved
        wanted = [leaf for leaf in leaves if leaf is not None]
        self.followed = _is_followed(wanted)
        for leaf in (*wanted, *outs):
            if isinstance(leaf, LeafTensor):
                leaf.value = None  # from now on a place in the graph


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _missing_pullback(residuals: Any, needs: Any, *cts: Any) -> Any:
    """An op that nobody has said anything about is not taken for a constant."""
    name, where = residuals
    if all(ct is None for ct in cts):
        return [None] * len(needs)
    raise NotDifferentiableError(
        message(
            f"{name} has no derivative: no autograd formula was registered for it",
            where,
            "to fix: register one (torch.library.register_autograd), or detach its input",
        )
    )


def _borrowed_pullback(residuals: Any, needs: Any, *cts: Any) -> Any:
    home, name, outs, leaves = residuals
    followed = _is_followed([leaf for leaf in leaves if leaf is not None])
    with mode_off():  # a pass that watches for the user's own parameters runs with the mode on
        return _pulled_back(home, name, outs, leaves, followed, cts)


def _apart_pullback(residuals: Any, needs: Any, *cts: Any) -> Any:
    formula, values = residuals
    with mode_off(), formula.saved.given(values):
        return _pulled_back(
            formula.home, formula.name, formula.outs, formula.leaves, formula.followed, cts
        )


def _pulled_back(home: Home, name: str, outs: Any, leaves: Any, followed: bool, cts: Any) -> Any:
    # A pullback may be called at another level and under other keys than the op was.
    home.capture()
    wanted = [leaf for leaf in leaves if leaf is not None]
    pairs = [
        (out, home.wrap(ct))
        for out, ct in zip(outs, cts, strict=True)
        if ct is not None and isinstance(out, Tensor) and out.requires_grad
    ]
    if not pairs:
        return [None] * len(leaves)
    try:
        with home.open(), without_hooks():
            grads = torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [ct for _, ct in pairs],
                retain_graph=True,
                # Some formulas take a shortcut unless they have to be differentiable themselves.
                create_graph=followed or _is_followed([ct for _, ct in pairs]),
                allow_unused=True,
            )
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_FORMULA):
            raise
        raise NotDifferentiableError(
            message(
                f"{name} has no derivative: {error}",
                home.interpreter.where(),
                "to fix: write the function with differentiable ops, or detach its input",
            )
        ) from error
    found = iter(grads)
    return [None if leaf is None else _value_or_none(next(found)) for leaf in leaves]


# How PyTorch says that it has no formula.
_NO_FORMULA = ("derivative for", "not implemented", "no autograd formula")


def _is_followed(leaves: list[Any]) -> bool:
    """Whether a level below, or the user's own autograd, may differentiate what is done here."""
    values = [leaf.value for leaf in leaves]
    return any(isinstance(v, LevelTensor) or v.requires_grad for v in values)


def _value_or_none(grad: Any) -> Any:
    """A cotangent or tangent; None for both of the ways in which C++ says zero."""
    return None if grad is None or grad._is_zerotensor() else unbox(grad)


def borrowed_jvp(interpreter: Any, known: OpFacts, tangents: Any, args: Any, kwargs: Any) -> Any:
    """Run an op in PyTorch's forward mode: `(out, out_t)`, or None if it has no such formula."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level >= 0:
        return None  # PyTorch has one level of forward mode, and it is taken
    if known.op in _NO_FORWARD or known.op in _INSTEAD:
        return None
    home = Home(interpreter)
    needs = [tangent is not None for tangent in tangents]
    boxed, inner, leaves = _wrap_operands(home, known, needs, args, kwargs)
    try:
        with (
            home.open(),
            without_hooks(),
            torch.no_grad(),
            forward_ad.dual_level(),
            forward_enabled(True),
        ):
            duals = {
                id(leaf): forward_ad.make_dual(leaf.detach(), home.wrap(tangent))
                for leaf, tangent in zip(leaves, tangents, strict=True)
                if leaf is not None
            }
            swap = lambda t: duals.get(id(t), t)  # noqa: E731 - three words, used twice below
            out = known.op(
                *[map_tensors(swap, arg) for arg in boxed],
                **{key: map_tensors(swap, value) for key, value in inner.items()},
            )
            found = _unpack(out)
    except (NotImplementedError, RuntimeError):
        # No formula, or one that writes to its own results, which fails on duals of wrappers. An
        # error that is the caller's comes up again when the two pullbacks run the op.
        return None
    # Some ops drop a tangent they have no formula for, so no tangent at all says nothing. What has
    # been drawn is kept: the two pullbacks would draw again.
    doubtful = _is_zero(found[1]) and not (known.is_random and is_known(known.op))
    return None if doubtful else found


def _is_zero(tangent: Any) -> bool:
    if isinstance(tangent, (tuple, list)):
        return all(_is_zero(item) for item in tangent)
    return tangent is None


def _unpack(out: Any) -> Any:
    if isinstance(out, Tensor):
        pair = torch.autograd.forward_ad.unpack_dual(out)
        return unbox(pair.primal), _value_or_none(pair.tangent)
    if isinstance(out, (tuple, list)):
        pairs = [_unpack(item) for item in out]
        return [p for p, _ in pairs], [t for _, t in pairs]
    return out, None
