"""The law of refusals: what an operator refuses alone it refuses under every transform.

The inputs are those that PyTorch's table gives as errors. Whether PyTorch refuses one is asked of
the torch that runs, for some of the table's errors are raised on other devices only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import lamina
from tests import devices
from tests.samples import LEFT_OUT, database

BATCH = 2
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Refused:
    """An operator on an input that it refuses.

    Attributes:
        text: What to print about it.
        function: Takes the tensors of the input; raises.
        tensors: They are plain and on the device of the run.
    """

    text: str
    function: Callable[..., Any]
    tensors: Tensors

    def fresh(self) -> Tensors:
        """Copies of the tensors, for an operator may write before it refuses."""
        return tuple(t.clone() for t in self.tensors)


def operators() -> list[str]:
    """Those that the table has errors of."""
    return [
        name
        for name, op in database().items()
        if op.error_inputs_func is not None and name not in LEFT_OUT
    ]


def refusals(name: str) -> Iterator[Refused]:
    """What an operator refuses, of the table's errors."""
    op = database()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors = [*op.error_inputs(str(devices.current()))]
    for position, error in enumerate(errors):
        sample = error.sample_input
        leaves, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        tensors = tuple(leaves[i].detach() for i in places)
        if not places or not all(map(_is_plain, tensors)):
            continue

        def function(
            *tensors: torch.Tensor, leaves: Any = leaves, spec: Any = spec, places: Any = places
        ) -> Any:
            given = [*leaves]
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            first, args, kwargs = tree_unflatten(given, spec)
            return op(first, *args, **kwargs)

        subject = Refused(f"{name}, error {position}: {error.error_regex[:60]}", function, tensors)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(*subject.fresh())
        except Exception:  # any refusal will do
            yield subject


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.device.type == devices.current().type
        and not tensor.is_quantized
    )


def _vmapped(subject: Refused, mapped: tuple[int, ...], dim: int) -> None:
    args = [
        torch.stack([t] * BATCH, dim if dim == 0 else t.dim()) if i in mapped else t
        for i, t in enumerate(subject.fresh())
    ]
    in_dims = tuple(
        (args[i].dim() - 1 if dim else 0) if i in mapped else None for i in range(len(args))
    )
    lamina.vmap(subject.function, in_dims, randomness="different")(*args)


def _differentiable(subject: Refused) -> list[int]:
    return [i for i, t in enumerate(subject.tensors) if t.is_floating_point() or t.is_complex()]


def _restricted(subject: Refused, places: list[int]) -> Callable[..., Any]:
    def function(*primals: torch.Tensor) -> Any:
        given = [*subject.fresh()]
        for place, primal in zip(places, primals, strict=True):
            given[place] = primal
        return subject.function(*given)

    return function


def _pulled(subject: Refused) -> None:
    places = _differentiable(subject)
    lamina.vjp(_restricted(subject, places), *[subject.fresh()[i] for i in places])


def _pushed(subject: Refused) -> None:
    places = _differentiable(subject)
    primals = tuple(subject.fresh()[i] for i in places)
    lamina.jvp(_restricted(subject, places), primals, tuple(map(torch.ones_like, primals)))


def ways(subject: Refused) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each transform that must refuse, with its name."""
    count = len(subject.tensors)
    choices = {tuple(range(count)), *((i,) for i in range(count))}
    for mapped in sorted(choices):
        for dim in (0, -1):
            yield f"vmap of {mapped} at {dim}", lambda m=mapped, d=dim: _vmapped(subject, m, d)
    if _differentiable(subject):
        yield "vjp", lambda: _pulled(subject)
        yield "jvp", lambda: _pushed(subject)


def answered(name: str) -> list[str]:
    """Where a transform answers what the operator alone refuses."""
    found = []
    for subject in refusals(name):
        for way, run in ways(subject):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run()
            except Exception:  # what it must raise is the concern of tests of messages
                continue
            shapes = [(list(t.shape), t.dtype) for t in subject.tensors]
            found.append(f"{subject.text}\n  {way} answers {shapes}")
    return found
