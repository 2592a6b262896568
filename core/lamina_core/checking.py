"""What LAMINA_DEBUG=1 holds against the answer that a level gives for an op.

Every wrapper must show what its value is, and stand for something: see `LevelTensor.fault`. And
what user code sees must have the shape and dtype that the op gives alone: see `logical`. The check
stands between the level and whoever hands it an op, so it sees the answers of all handlers, and
costs nothing while it is off.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lamina_core.errors import LaminaError, RuleError
from lamina_core.interpreter import Interpreter
from lamina_core.level import stand_in
from lamina_core.logical import UNKNOWN, Look, Outcome, Signature, ask, looks, try_on
from lamina_core.outer import autocast_keys
from lamina_core.refusals import NoExampleError, example
from lamina_core.schema import facts
from lamina_core.tensors import tensors_in

__all__: list[str] = []

Tensor = torch.Tensor


def _checked(interpreter: Interpreter) -> Any:
    """Has the answers of a level checked while it is active."""
    return stand_in(interpreter, partial(_process, interpreter), checks=True)


Interpreter.checked = _checked


def _process(
    interpreter: Interpreter, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run one op at a level, and check what it gives.

    Raises:
        RuleError: If the answer is not what the op gives for one example.
    """
    # Before the op, which may change the shape of its argument in place.
    signature = Signature(op, args, kwargs)
    out = type(interpreter).process(interpreter, op, args, kwargs)
    own = [tensor for tensor in tensors_in((out,), {}) if interpreter.is_own(tensor)]
    for tensor in own:
        fault = tensor.fault()
        if fault is not None:
            raise _wrong(interpreter, op, fault)
    if own and signature.key is not None:
        _compare(interpreter, signature, looks(out))
    return out


def _wrong(interpreter: Interpreter, op: Any, *lines: str) -> Exception:
    try:
        by = f"answered by: {interpreter.explain_op(op)}"
    except NotImplementedError:  # a level that is no transform of users
        by = ""
    return interpreter.error(RuleError, f"a wrong answer for {op}", *lines, by)


def _compare(
    interpreter: Interpreter, signature: Signature, answer: tuple[Look | None, ...]
) -> None:
    """Hold an answer against what the op gives alone.

    Raises:
        RuleError: If they differ, and the op on one example does too.
    """
    op = signature.op
    if op._schema.name in _BETWEEN_PARTS:
        return
    # Inside a composite op autocast acts as well, which does not act on meta tensors.
    dtypes = not facts(op).is_composite or autocast_keys() is None
    outcome = ask(signature)
    if _agree(answer, outcome, dtypes):
        return
    if not outcome.certain or _has_integers(signature):
        outcome = _of_one_example(signature)
        if _agree(answer, outcome, dtypes):
            return
    if outcome.refusal is not None:
        raise _wrong(interpreter, op, f"the op alone refuses: {outcome}")
    raise _wrong(interpreter, op, f"gave {Outcome(answer)}, and the op alone gives {outcome}")


# Ops that PyTorch's own code puts between others, and that we answer as that code needs it.
_BETWEEN_PARTS = frozenset(
    (
        "aten::_embedding_bag_forward_only",  # with the facts that are kept for a gradient
        "aten::embedding_bag",
        "aten::_nnpack_spatial_convolution",  # of any dtype, as other convolutions
        "aten::_unsafe_view",  # of what is laid out in another way than alone
        "torch_nn::_linear_cross_entropy_batch_chunked",  # without the gradients it computes ahead
    )
)


def _agree(answer: tuple[Look | None, ...], outcome: Outcome, dtypes: bool) -> bool:
    if outcome.outs is None:
        return outcome.refusal is None
    return len(answer) == len(outcome.outs) and all(
        mine is None or theirs is None or (mine == theirs if dtypes else mine[0] == theirs[0])
        for mine, theirs in zip(answer, outcome.outs, strict=True)
    )


def _has_integers(signature: Signature) -> bool:
    """Whether elements may say what shape the outputs have: lengths, or where to split."""
    tensors = tensors_in(signature.args, signature.kwargs)
    return any(not (t.is_floating_point() or t.is_complex()) for t in tensors)


def _of_one_example(signature: Signature) -> Outcome:
    """What the op gives for the first example; nothing where there is none to be had."""
    try:
        args = tuple([example(arg) for arg in signature.args])
        kwargs = {name: example(value) for name, value in signature.kwargs.items()}
    except (LaminaError, NoExampleError):
        return UNKNOWN
    if Signature(signature.op, args, kwargs).key is None:
        return UNKNOWN
    return try_on(signature, args, kwargs)
