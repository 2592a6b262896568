"""`UserFunction`: a subclass of `torch.autograd.Function`, in either form, as a `Custom`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from lamina_core import pytree
from lamina_core.errors import MutationError, NotDifferentiableError, RuleError, message
from lamina_core.function import Applied, Custom, Needs, apply_custom, install
from lamina_core.wrapper import LevelTensor

__all__ = ["Context", "Meta", "UserFunction", "differentiated_twice"]

_CLASSES = LevelTensor.classes
Tensor = torch.Tensor
_ONCE: Any = once_differentiable(lambda ctx: None).__code__
_FLAGS = frozenset(
    "_forward_cls _input_grad_buffers _unpacked dirty_tensors materialize_grads needs_input_grad "
    "non_differentiable output_grad_dtypes saved_for_forward to_save".split()
)


class Context(FunctionCtx):
    """The `ctx` of a user's function; its methods are PyTorch's."""

    def __init__(self, cls: type, needs: Needs) -> None:
        self._forward_cls = cls
        self.needs_input_grad = needs
        self.materialize_grads = True
        self.to_save: tuple[Any, ...] = ()
        self.saved_for_forward: Any = None
        self.dirty_tensors: tuple[Any, ...] = ()
        self.non_differentiable: tuple[Any, ...] = ()
        self._unpacked: tuple[Any, ...] = ()
        self.output_grad_dtypes: tuple[Any, ...] | None = None
        self._input_grad_buffers: tuple[None, ...] = ()

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What `save_for_backward` was given (in `jvp`: `save_for_forward`, if it was called)."""
        return self._unpacked


class _Slot:
    """Marks the place of a tensor in what a context held."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class Meta:
    """The shape, dtype and device of an argument or output."""

    __slots__ = ("device", "differentiable", "dtype", "shape")

    def __init__(self, tensor: Any) -> None:
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.differentiable = tensor.is_floating_point() or tensor.is_complex()

    def zeros(self) -> Any:
        """A zero of this shape."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class _Frame:
    """A context without its tensors: the `rest` of `Applied`."""

    __slots__ = (
        "attributes",
        "dtypes",
        "ins",
        "materialize",
        "outs",
        "saved",
        "saved_for_forward",
    )

    attributes: dict[str, Any]
    saved: list[Any]
    saved_for_forward: list[Any] | None
    materialize: bool
    dtypes: tuple[Any, ...] | None  # in which backward wants its cotangents, if it says so
    ins: list[Meta | None]
    outs: list[Meta | None]


def _unwrapped(function: Any) -> list[Any]:
    """A function and those that decorators have wrapped."""
    chain = [function]
    while (function := getattr(function, "__wrapped__", None)) is not None:
        chain.append(function)
    return chain


def _is_once(function: Any) -> bool:
    return getattr(function, "__code__", None) is _ONCE


def _mentions(function: Any, *names: str) -> bool:
    codes = [getattr(f, "__code__", None) for f in _unwrapped(function)]
    return any(code is not None and set(names) & set(code.co_names) for code in codes)


class UserFunction(Custom):
    """A subclass of `torch.autograd.Function`.

    Attributes:
        user_backward: Its backward, by either of the names.
    """

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        self.name = cls.__name__
        self.in_two_steps = cls.setup_context is not Function.setup_context
        self.has_jvp = cls.jvp is not Function.jvp
        self.user_backward = cls.backward if cls.vjp is Function.vjp else cls.vjp
        self.may_write = _mentions(cls.forward, "mark_dirty", "dirty_tensors") or _mentions(
            cls.setup_context, "mark_dirty", "dirty_tensors"
        )

    @property
    def vmap_rule(self) -> Any:
        """The user's own `vmap`; without `setup_context` there would be no `ctx` above it."""
        own = self.cls.vmap is not Function.vmap and self.in_two_steps
        return self.cls.vmap if own else None

    @property
    def once(self) -> bool:
        """Whether backward is marked with `@once_differentiable`."""
        return any(_is_once(f) for f in _unwrapped(self.user_backward))

    def opened(self) -> UserFunction:
        """The same with the backward that is marked; one behind other decorators stays closed."""
        opened = copy.copy(self)
        if _is_once(self.user_backward):
            opened.user_backward = self.user_backward.__wrapped__
        return opened

    def forward(self, args: tuple[Any, ...], needs: Needs) -> Applied:
        """Run the user's forward, and `setup_context` if there is one."""
        ctx = Context(self.cls, needs)
        with torch.no_grad():
            shown = _claiming(args, needs)
            if self.in_two_steps:
                out = self.cls.forward(*shown)
                self.cls.setup_context(ctx, shown, out)
            else:
                out = self.cls.forward(ctx, *shown)
            applied = self._capture(ctx, shown, out)
        return applied.lifted(args, applied.outs)

    def set_up(self, args: tuple[Any, ...], out: Any, needs: Needs) -> Applied:
        """`forward`, where a rule of the user's has computed the outputs."""
        ctx = Context(self.cls, needs)
        with torch.no_grad():
            shown = _claiming(args, needs)
            self.cls.setup_context(ctx, shown, out)
            applied = self._capture(ctx, shown, out)
        return applied.lifted(args, applied.outs)

    def _capture(self, ctx: Context, args: tuple[Any, ...], out: Any) -> Applied:
        """Take the tensors out of a context."""
        outs = list(out) if isinstance(out, tuple) else [out]
        places = {id(arg): i for i, arg in enumerate(args) if isinstance(arg, Tensor)}
        written = self._written(ctx, places, outs)
        known: dict[int, int] = {id(o): -1 - j for j, o in enumerate(outs) if id(o) not in places}
        known.update(places)
        known.update({id(outs[j]): -1 - j for _, j in written})
        tensors: list[Any] = []
        sources: list[int | None] = []
        slots: dict[int, _Slot] = {}

        def slot(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in slots:
                slots[id(value)] = _Slot(len(tensors))
                tensors.append(value)
                sources.append(known.get(id(value)))
            return slots[id(value)]

        frame = _Frame()
        frame.saved = [slot(value) for value in ctx.to_save]
        forward = ctx.saved_for_forward
        frame.saved_for_forward = None if forward is None else [slot(value) for value in forward]
        frame.attributes = {
            name: pytree.tree_map(slot, value) if _holds_tensor(value) else value
            for name, value in ctx.__dict__.items()
            if name not in _FLAGS
        }
        if None in sources and self.once:
            # Through an intermediate the backward depends on arguments: a level that differentiates
            # it has to find that out.
            for arg in args:
                slot(arg)
        frame.materialize = ctx.materialize_grads
        frame.dtypes = ctx.output_grad_dtypes
        frame.ins = [Meta(arg) if isinstance(arg, Tensor) else None for arg in args]
        frame.outs = [Meta(o) if isinstance(o, Tensor) else None for o in outs]
        constant = {id(tensor) for tensor in ctx.non_differentiable}
        dirty = {j for _, j in written}
        return Applied(
            [o.view_as(o) if id(o) in places and j not in dirty else o for j, o in enumerate(outs)],
            single=not isinstance(out, tuple),
            tensors=tensors,
            sources=sources,
            rest=frame,
            constant=frozenset(j for j, o in enumerate(outs) if id(o) in constant),
            written=written,
        )

    def _written(
        self, ctx: Context, places: dict[int, int], outs: list[Any]
    ) -> tuple[tuple[int, int], ...]:
        """Which output shows which argument after it has been written to."""
        pairs = []
        for tensor in ctx.dirty_tensors:
            if tensor is None:
                continue
            at = places.get(id(tensor))
            index = next((j for j, o in enumerate(outs) if o is tensor), None)
            if not self.may_write or at is None or index is None:
                raise MutationError(
                    message(
                        f"{self.name} marks a tensor as dirty, which cannot be followed here",
                        "it is not an argument" if at is None else "",
                        "forward does not return it" if index is None else "",
                        "" if self.may_write else "mark_dirty is called outside its forward",
                        "to fix: write to an argument of forward, call ctx.mark_dirty(argument) "
                        "there, and return it",
                    )
                )
            pairs.append((at, index))
        return tuple(pairs)

    def _context(self, tensors: Sequence[Any], frame: _Frame, needs: Needs, saved: Any) -> Context:
        def fill(value: Any) -> Any:
            return tensors[value.index] if isinstance(value, _Slot) else value

        ctx = Context(self.cls, needs)
        ctx.materialize_grads = frame.materialize
        # Sums of cotangents are the tape's own: there is no buffer to hand out.
        ctx._input_grad_buffers = (None,) * len(frame.ins)
        for name, value in frame.attributes.items():
            filled = pytree.tree_map(fill, value) if _holds_slot(value) else value
            setattr(ctx, name, filled)
        ctx._unpacked = tuple([fill(value) for value in saved])
        return ctx

    def backward(
        self, tensors: Sequence[Any], rest: Any, needs: Needs, cts: Sequence[Any]
    ) -> list[Any]:
        """Run the user's backward."""
        if self.once:
            once = _Once(self, rest, needs, len(cts))
            args = (*cts, *tensors)
            return apply_custom(once, args, (False,) * len(args)).outs
        return self.backward_once(tensors, rest, needs, cts)

    def backward_once(
        self, tensors: Sequence[Any], frame: _Frame, needs: Needs, cts: Sequence[Any]
    ) -> list[Any]:
        """Run the user's backward, whether or not it may be differentiated again."""
        ctx = self._context(tensors, frame, needs, frame.saved)
        if frame.materialize:
            cts = [
                meta.zeros() if ct is None and meta is not None else ct
                for ct, meta in zip(cts, frame.outs, strict=True)
            ]
        if frame.dtypes is not None:
            cts = [
                ct if ct is None or dtype is None else ct.to(dtype)
                for ct, dtype in zip(cts, frame.dtypes, strict=True)
            ]
        boxed = getattr(self.cls, "boxed_grads_call", False)
        found = self.user_backward(ctx, list(cts)) if boxed else self.user_backward(ctx, *cts)
        return self._checked(found, frame, needs)

    def _checked(self, found: Any, frame: _Frame, needs: Needs) -> list[Any]:
        """One cotangent or None for each argument that wants one, in its shape and dtype."""
        grads = list(found) if isinstance(found, tuple) else [found]
        count = len(frame.ins)
        extra = grads[count:]
        if len(grads) < count or any(grad is not None for grad in extra):
            raise RuleError(
                message(
                    f"the backward of {self.name} returned {len(grads)} gradients, "
                    f"but its forward takes {count} arguments",
                    "to fix: return one gradient for each argument, None for those without one",
                )
            )
        return [
            None
            if grad is None or meta is None or not need or not meta.differentiable
            else self._fitted(grad, meta, i)
            for i, (grad, meta, need) in enumerate(zip(grads, frame.ins, needs, strict=False))
        ]

    def _fitted(self, grad: Any, meta: Meta, index: int) -> Any:
        if not isinstance(grad, Tensor):
            raise self._bad_gradient(index, type(grad).__name__, meta)
        if grad.shape != meta.shape:
            rank = len(meta.shape)
            lead = grad.dim() - rank
            tail = zip(grad.shape[max(lead, 0) :], meta.shape, strict=False)
            if lead < 0 or any(have != want and want != 1 for have, want in tail):
                raise self._bad_gradient(index, f"a tensor of shape {list(grad.shape)}", meta)
            grad = grad.sum_to_size(meta.shape)
        if grad.dtype is not meta.dtype:
            if grad.is_complex() and not meta.dtype.is_complex:
                grad = grad.real
            grad = grad.to(meta.dtype)
        return grad

    def _bad_gradient(self, index: int, got: str, meta: Meta) -> RuleError:
        return RuleError(
            message(
                f"the backward of {self.name} returned {got} as gradient {index}",
                f"argument {index} of its forward has shape {list(meta.shape)}",
                "to fix: return a gradient of the argument's shape",
            )
        )

    def jvp(self, tensors: Sequence[Any], rest: Any, tangents: Sequence[Any]) -> list[Any]:
        """Run the user's jvp."""
        saved = rest.saved if rest.saved_for_forward is None else rest.saved_for_forward
        needs = tuple([tangent is not None for tangent in tangents])
        ctx = self._context(tensors, rest, needs, saved)
        if rest.materialize:
            tangents = [
                meta.zeros() if t is None and meta is not None and meta.differentiable else t
                for t, meta in zip(tangents, rest.ins, strict=True)
            ]
        found = self.cls.jvp(ctx, *tangents)
        out_ts = list(found) if isinstance(found, tuple) else [found]
        if len(out_ts) != len(rest.outs):
            raise RuleError(
                message(
                    f"the jvp of {self.name} returned {len(out_ts)} tangents, but its forward "
                    f"returns {len(rest.outs)} outputs",
                    "to fix: return one tangent for each output, None for zero",
                )
            )
        return out_ts


class _Once(Custom):
    """A backward that may not be differentiated, as a function of cotangents and saved tensors."""

    def __init__(self, function: UserFunction, frame: _Frame, needs: Needs, count: int) -> None:
        self.name = f"the backward of {function.name}"
        self.function = function
        self.frame = frame
        self.needs = needs
        self.count = count

    def forward(self, args: tuple[Any, ...], needs: Needs) -> Applied:
        """The user's backward on values."""
        cts, tensors = args[: self.count], args[self.count :]
        with torch.no_grad():
            return Applied(self.function.backward_once(tensors, self.frame, self.needs, cts))

    def backward(
        self, tensors: Sequence[Any], rest: Any, needs: Needs, cts: Sequence[Any]
    ) -> list[Any]:
        """There is none."""
        raise differentiated_twice(self.name)


def differentiated_twice(name: str) -> NotDifferentiableError:
    """The error for a second derivative that a decorator forbids."""
    return NotDifferentiableError(
        message(
            f"{name} is differentiated, but it is marked with @once_differentiable",
            "it serves first derivatives, by vjp or by jvp; a second one needs its own",
            "to fix: write the backward with differentiable ops and take the decorator off",
        )
    )


def _claiming(args: tuple[Any, ...], needs: Needs) -> tuple[Any, ...]:
    """Arguments as forward finds them in PyTorch, where those say so that require grad.

    They are values of a level that follows nothing; it is a level above that differentiates.
    """
    return tuple(
        [
            _claim(arg)
            if need
            and isinstance(arg, Tensor)
            and Meta(arg).differentiable
            and not arg.requires_grad
            else arg
            for arg, need in zip(args, needs, strict=True)
        ]
    )


def _could_claim(arg: Any) -> bool:
    return not arg.requires_grad and (arg.is_floating_point() or arg.is_complex())


def _claim(arg: Any) -> Any:
    if type(arg) not in _CLASSES:
        return arg.detach().requires_grad_()
    shown = torch.ops.aten.alias.default(arg)
    shown.claims_grad = True
    return shown


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        not pytree.is_leaf(value) and any(isinstance(leaf, Tensor) for leaf in pytree.leaves(value))
    )


def _holds_slot(value: Any) -> bool:
    return isinstance(value, _Slot) or (
        not pytree.is_leaf(value) and any(isinstance(leaf, _Slot) for leaf in pytree.leaves(value))
    )


def _make(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Custom, Any]:
    custom = UserFunction(cls)
    if custom.in_two_steps:
        bound = inspect.signature(cls.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        return custom, bound.args
    if kwargs:
        raise TypeError(
            message(
                f"{custom.name}.apply got keyword arguments: {', '.join(kwargs)}",
                "to fix: pass them positionally, or define setup_context",
            )
        )
    return custom, args


install(_make)
