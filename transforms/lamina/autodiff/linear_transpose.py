"""`linear_transpose`: the transposed map of a linear function.

# NOTE [What is linear]
The function runs on a tape, and the values on the tape belong to a level below that knows which of
them depend on the inputs (`lamina.autodiff.record`). The function is linear if

* what depends on the inputs lies on the tape: an op that leaves it, by rounding or comparing, is
  found by `_LinearInterpreter` where its result is used;
* no pullback reads a value that depends on the inputs: the derivative is the same everywhere;
* the function of zeros is zero: no constant is added. This asks for values, which fake tensors do
  not have; while they are traced, the transpose is that of the linear part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from lamina.autodiff.checks import is_differentiable, likes, match, need_differentiable
from lamina.autodiff.function import _apply_vjp
from lamina.autodiff.program import Program, Slot
from lamina.autodiff.record import RecordedTensor, RecordInterpreter
from lamina.autodiff.reverse import ReverseInterpreter
from lamina.autodiff.runs import ReverseRun, run_reverse
from lamina.autodiff.tape import backward
from lamina_core import pytree
from lamina_core.function import Applied, Custom, Needs, applying
from lamina_core.mode import mode_off
from lamina_core.overloads import aten
from lamina_core.scopes import run_at
from lamina_core.tensors import tensors_in
from lamina_core.torch_hooks.modes import disable_modes
from lamina_core.torch_hooks.registry import FakeTensor
from lamina_core.wrapper import plain_of

__all__ = ["linear_transpose"]

Tensor = torch.Tensor


def linear_transpose(
    func: Callable[..., Any], *primals: Any, **kwargs: Any
) -> Callable[[Any], tuple[Any, ...]]:
    """The transposed map of a linear function, ct -> J^T ct.

    `func` runs once, on zeros; the function returned runs the transposed ops. For complex values it
    is the plain transpose, as in JAX, and not the conjugate transpose J^H of `vjp`: twice
    transposed is the function itself.

    Args:
        func: Linear in all of `*primals` together; returns a pytree of tensors.
        *primals: Pytrees of floating-point and complex tensors, of which shape, dtype and device
            count and no element is read. Those on the device "meta" stand for ones on the default
            device. Other leaves are constants, and get None in the result.
        **kwargs: Reach `func`, and are constants.

    Returns:
        A function that takes cotangents like the output (None for zero) and returns a tuple of
        cotangents like `primals`. It may be called any number of times, also under transforms.

    Raises:
        NotLinearError: If an op of `func` is not linear in the primals, or adds a constant.
        NotDifferentiableError: If no leaf of `primals` is a floating-point or complex tensor.
        TangentError: By the function returned, if the cotangents do not match the output.

    Example:
        >>> import torch
        >>> from lamina import linear_transpose
        >>> transposed = linear_transpose(lambda x: x.cumsum(0), torch.empty(3))
        >>> transposed(torch.tensor([1.0, 2.0, 3.0]))
        (tensor([6., 5., 3.]),)
    """
    leaves, spec = pytree.flatten(primals)
    need_differentiable(leaves, primals, range(len(primals)), "linear_transpose")
    zeros = [_zero(leaf) for leaf in leaves if is_differentiable(leaf)]
    with RecordInterpreter("linear_transpose", "inputs") as inputs:
        wrapped = iter([inputs.input(zero) for zero in zeros])
        given = [next(wrapped) if is_differentiable(leaf) else leaf for leaf in leaves]
        level = _LinearInterpreter("linear_transpose")
        args = pytree.unflatten(spec, given)

        def checked(*args: Any, **kwargs: Any) -> Any:
            out = func(*args, **kwargs)
            level.check(pytree.leaves(out))
            return out

        run = run_reverse(level, checked, args, range(len(args)), kwargs, False)
        shapes = [_zero_value(value) for value in run.values]
        with RecordInterpreter("linear_transpose", "cotangents") as recorder:
            cts = [None if shape is None else recorder.input(shape) for shape in shapes]
            program = recorder.program(_pulled(run, inputs, cts))
    _refuse_constants(inputs, run.values, zeros)
    program.seal()
    out_spec, wanted = run.out_spec, likes(shapes)

    def transposed(cotangents: Any) -> tuple[Any, ...]:
        """Send cotangents of the output to cotangents of the primals."""
        found = match(cotangents, wanted, out_spec, "cotangents", "output")
        values = [
            torch.zeros_like(shape) if ct is None else _conjugate(ct)
            for ct, shape in zip(found, shapes, strict=True)
            if shape is not None
        ]
        pulled = zip(program(values), zeros, strict=True)
        filled = iter([torch.zeros_like(z) if ct is None else _conjugate(ct) for ct, z in pulled])
        trees = [next(filled) if is_differentiable(leaf) else None for leaf in leaves]
        result: tuple[Any, ...] = pytree.unflatten(spec, trees)
        return result

    return transposed


def _zero(leaf: Any) -> Any:
    device = torch.get_default_device() if leaf.is_meta else leaf.device
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=device)


def _zero_value(value: Any) -> Any:
    """A zero like an output; None for one that takes no cotangent."""
    if not is_differentiable(value):
        return None
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device)


def _conjugate(ct: Any) -> Any:
    """Between J^H, which pullbacks compute, and J^T."""
    return torch.conj_physical(ct) if ct.is_complex() else ct


class _LinearInterpreter(ReverseInterpreter):
    """A tape on which everything lies that depends on the inputs."""

    transform: ClassVar[str] = ""  # as in `RecordInterpreter`

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.transform = name  # type: ignore[misc]

    def process(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one op on values that are linear in the inputs so far."""
        if op is not _CHECK_ERRORS:
            self.check(tensors_in(args, kwargs))
        return super().process(op, args, kwargs)

    def check(self, values: Sequence[Any]) -> None:
        """Raise if one of some values depends on the inputs and has no derivative."""
        for value in values:
            if self.is_own(value) and value.node is None and type(value.value) is RecordedTensor:
                recorder: Any = value.value.interpreter
                if not recorder.is_constant(value.value):
                    raise recorder.not_linear(
                        recorder.origin(value.value),
                        "a result of it depends on the input, but has no derivative",
                    )


_CHECK_ERRORS = aten._linalg_check_errors.default


@applying(_LinearInterpreter)
def _apply(
    interpreter: _LinearInterpreter, custom: Custom, args: tuple[Any, ...], needs: Needs
) -> Applied:
    """As at any level of reverse mode, but for the check."""
    interpreter.check([arg for arg in args if isinstance(arg, Tensor)])
    return _apply_vjp(interpreter, custom, args, needs)


def _pulled(run: ReverseRun, inputs: RecordInterpreter, cts: list[Any]) -> list[Any]:
    """The cotangents of the inputs; an error if a derivative depends on the inputs."""
    stack = [position[0] for position in run.positions if position is not None]
    seen = set()
    while stack:
        node = stack.pop()
        if node.sequence in seen or node.pullback is None:
            continue
        seen.add(node.sequence)
        node.pullback = functools.partial(_named_pullback, inputs, node.name, node.pullback)
        stack.extend(parent[0] for parent in node.parents if parent is not None)
    wanted = [node for node in run.in_nodes if node is not None]
    if run.interpreter.watch:
        return backward(run.positions, cts, wanted, release=True)
    with mode_off():
        return backward(run.positions, cts, wanted, release=True)


def _named_pullback(inputs: RecordInterpreter, name: Any, pullback: Any, *given: Any) -> Any:
    """A pullback during which an op on the inputs is an error that names the op pulled back."""
    inputs.closed = str(name)
    return pullback(*given)


def _refuse_constants(inputs: RecordInterpreter, values: list[Any], zeros: list[Any]) -> None:
    """Raise unless the function of zeros is zero."""
    if _all_zero([v.value if inputs.is_own(v) else v for v in values]):
        return
    for step in inputs.steps:
        outs = [Slot(slot) for slot in step.outs if slot is not None]
        if not _all_zero(Program("linear_transpose", inputs.size, inputs.steps, outs)(zeros)):
            raise inputs.not_linear(step.name, "it adds a constant: of zeros it is not zero")
    raise inputs.not_linear("an output", "it is a constant other than zero")


def _all_zero(values: list[Any]) -> bool:
    """Whether values are zero, or NaN: zero times a factor that is not finite."""
    plain = [plain_of(value) for value in values if is_differentiable(value)]
    if any(isinstance(tensor, FakeTensor) for tensor in plain):
        return True
    with run_at(None), torch.no_grad(), disable_modes():
        return not any(bool((tensor.abs() > 0).any()) for tensor in plain)
