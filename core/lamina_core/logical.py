"""What an op gives for tensors of some shapes and dtypes: the op itself is asked, on meta tensors.

A transform may compute an op in any way it likes, but what user code sees of the result has to be
what the op gives alone: its shape and its dtype, or its refusal. `ask` tries the op once for each
*signature*, which is all of a call but the elements of its tensors, and remembers the outcome.

A meta kernel may be missing, or disagree with the kernel that computes. `try_on` runs the op on
tensors with elements, and what it says is remembered in place of what the meta kernel said.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from lamina_core.config import dtype_name
from lamina_core.outer import AUTOCAST, BELOW_AUTOGRAD
from lamina_core.schema import facts
from lamina_core.torch_hooks.keys import ExcludeKeys
from lamina_core.torch_hooks.modes import disable_function_modes, disable_modes

__all__ = ["UNKNOWN", "Look", "Outcome", "Signature", "ask", "looks", "try_on"]

_META = torch.device("meta")
_KEPT = 50_000
Tensor = torch.Tensor
Look = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Outcome:
    """What an op gives for one signature.

    Attributes:
        outs: Shape and dtype of each output, lists flattened; None for what is no tensor. None
            altogether if the op could not be asked, or refuses.
        refusal: The error that the op raises.
        certain: Whether the kernel that computes has said so, not the meta kernel.
    """

    outs: tuple[Look | None, ...] | None = None
    refusal: Exception | None = None
    certain: bool = False

    def __str__(self) -> str:
        """The outputs as logs show tensors, or the error."""
        if self.outs is None:
            return "nothing" if self.refusal is None else str(self.refusal).partition("\n")[0]
        return ", ".join("no tensor" if out is None else _shown(out) for out in self.outs)


def _shown(look: Look) -> str:
    """A shape and dtype as logs show them, such as `f32[2, 3]`."""
    return f"{dtype_name(look[1])}[{', '.join(map(str, look[0]))}]"


UNKNOWN = Outcome()


class _NoSignatureError(Exception):
    """An argument by whose type and value a call cannot be told from others."""


class Signature:
    """A call without the elements of its tensors; equal ones have equal outcomes.

    Args:
        op: The overload.
        args: Its positional arguments, tensors of any kind among them.
        kwargs: Its keyword arguments.

    Attributes:
        key: What it is remembered by; None for a call that cannot be asked about: an op that draws,
            or whose result has a shape that depends on values, or an argument of an odd kind.
    """

    __slots__ = ("args", "key", "kwargs", "op")

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.op = op
        self.args = args
        self.kwargs = kwargs
        self.key: Any = None
        if not _UNASKED.isdisjoint(op.tags) or op._schema.name in _PECULIAR:
            return
        try:
            named = tuple((name, _key(kwargs[name])) for name in sorted(kwargs))
            self.key = (id(op), torch.get_default_dtype(), tuple(map(_key, args)), named)
        except _NoSignatureError:
            return

    def on_meta(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with meta tensors made from the key, which no op has changed since."""
        _, _, args, kwargs = self.key
        given = {name: _from_key(key) for name, key in kwargs}
        if "device" in facts(self.op).arg_names[len(args) :]:
            given["device"] = _META
        return tuple([_from_key(key) for key in args]), given


_UNASKED = frozenset(
    (
        torch.Tag.data_dependent_output,
        torch.Tag.dynamic_output_shape,
        torch.Tag.nondeterministic_seeded,
    )
)
# Ops that ask about, or act on, something else than shapes and dtypes.
_PECULIAR = frozenset(
    f"aten::{name}" for name in ("is_pinned", "pin_memory", "record_stream", "set_", "to_sparse")
)


def _key(arg: Any) -> Any:
    kind = type(arg)
    if arg is None or kind in _BY_VALUE:
        return kind, arg
    if isinstance(arg, Tensor):
        if arg.layout is not torch.strided or arg.is_quantized or arg.is_nested:
            raise _NoSignatureError
        sizes = (*arg.shape, *arg.stride())
        if any(type(size) is not int for size in sizes):
            raise _NoSignatureError  # a symbolic size, which would be fixed by looking at it
        return Tensor, sizes, arg.dtype
    if kind is list or kind is tuple:
        return kind, tuple(map(_key, arg))
    raise _NoSignatureError


_BY_VALUE = frozenset(
    (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
)


def _from_key(key: Any) -> Any:
    kind = key[0]
    if kind is Tensor:
        _, sizes, dtype = key
        rank = len(sizes) // 2
        return torch.empty_strided(sizes[:rank], sizes[rank:], dtype=dtype, device=_META)
    if kind is torch.device:
        return _META
    if kind is list or kind is tuple:
        return kind(map(_from_key, key[1]))
    return key[1]


_OUTCOMES: dict[Any, Outcome] = {}


def ask(signature: Signature) -> Outcome:
    """What the op gives for a signature, by its meta kernel unless more is known."""
    if signature.key is None:
        return UNKNOWN
    found = _OUTCOMES.get(signature.key)
    if found is None:
        try:
            with alone():
                args, kwargs = signature.on_meta()
                found = Outcome(looks(signature.op(*args, **kwargs)))
        except NotImplementedError:  # no kernel for the device or the dtype
            found = UNKNOWN
        except Exception as error:  # whatever the op raises is its answer
            found = Outcome(refusal=error.with_traceback(None))
        _remember(signature, found)
    return found


def try_on(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
    """What the op gives for plain tensors of a signature; remembered for the signature.

    The tensors are copied first, for the op may write to them.
    """
    try:
        with alone():
            out = signature.op(*map(_copy, args), **{k: _copy(v) for k, v in kwargs.items()})
            found = Outcome(looks(out), certain=True)
    except NotImplementedError:
        found = UNKNOWN
    except Exception as error:
        # Not remembered: it may be due to elements that other tensors of the signature do not have.
        return Outcome(refusal=error.with_traceback(None), certain=True)
    _remember(signature, found)
    return found


def _remember(signature: Signature, outcome: Outcome) -> None:
    if len(_OUTCOMES) >= _KEPT:
        _OUTCOMES.clear()
    _OUTCOMES[signature.key] = outcome


def _copy(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        if 0 in arg.stride():  # an expanded one would come out dense
            return arg.detach()
        return arg.detach().clone()
    if isinstance(arg, (list, tuple)):
        return type(arg)(map(_copy, arg))
    return arg


def looks(out: Any) -> tuple[Look | None, ...]:
    """Shape and dtype of each output of an op, lists flattened; None for what is no tensor."""
    if isinstance(out, (list, tuple)):
        return tuple([look for item in out for look in looks(item)])
    return ((tuple(out.shape), out.dtype) if isinstance(out, Tensor) else None,)


class alone:
    """A block in which an op meets no mode, no autograd and no autocast, and warns nobody."""

    __slots__ = ("guards",)

    def __enter__(self) -> None:
        self.guards: list[Any] = [
            disable_modes(),
            disable_function_modes(),
            ExcludeKeys(BELOW_AUTOGRAD | AUTOCAST),
            torch.no_grad(),
            warnings.catch_warnings(),
        ]
        for guard in self.guards:
            guard.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *exc: object) -> None:
        for guard in reversed(self.guards):
            guard.__exit__(None, None, None)
