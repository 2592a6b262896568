"""Dtypes of elementwise ops under `vmap` are those of the example.

Of each op all choices of dtypes, of dims or none, and of mapped or not, for its operands: values,
dtypes and refusals are those of a loop. By default a spread of the choices is tried, exhaustively
all pairs and many triples.
"""

from __future__ import annotations

import functools
import itertools
import random
import warnings

import pytest
import torch

from lamina import vmap
from lamina_core.errors import LaminaError
from lamina_core.schema import facts
from tests.laws import close

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
BATCH = 2
SHAPES = ((), (3,))
SPREAD = 60
MANY = 4000

# Elementwise by their tag, but not of any dtypes, or used by PyTorch with equal ones only.
SPECIAL = frozenset(
    (
        "aten::ldexp",  # an exponent in half precision is rounded where others are not
        "aten::equal",  # gives one Python value
        "aten::gelu_backward",  # gives float32 for the two half types on a CPU
        "aten::native_dropout_backward",  # its mask is of bools
    )
)


@functools.cache
def overloads(write: str) -> dict[str, object]:
    """The elementwise overloads of two or more tensors, by name: pure, in place or with `out`."""
    found = {}
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            known = facts(op)
            writes = {(): "", (0,): "in place", ("out",): "out"}.get(known.mutated)
            if writes != write or not known.is_pointwise or op._schema.name in SPECIAL:
                continue
            if len(known.tensor_args) >= 2 and not known.list_args and _template(op) is not None:
                found[known.name] = op
    return found


def _template(op) -> list | None:
    """The arguments, with None for a tensor; None if there is one that we cannot think of."""
    values = {"number": 2, "float": 0.5, "int": 1, "bool": False}
    found = []
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.kwarg_only:
            continue
        if kind in ("Tensor", "Optional[Tensor]"):
            found.append(None)
        elif argument.has_default_value():
            found.append(argument.default_value)
        elif kind in values:
            found.append(values[kind])
        else:
            return None
    return found


def _draw(dtype, shape, seed):
    x = 0.3 + 3 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    if dtype is torch.bool:
        return x > 1.5
    if dtype.is_complex:
        return torch.complex(x, x / 3).to(dtype)
    return x.to(torch.float64).to(dtype) if dtype.is_floating_point else (x + 1).to(dtype)


def _widened(x):
    """A complex tensor of half precision, which has no `abs` on a CPU, in a dtype that has."""
    return x.to(torch.complex64) if x.is_complex() and x.itemsize == 4 else x


def choices(op, count):
    """Dtype, shape and whether it is mapped, of each operand; a spread of `count` of them all."""
    operands = len(facts(op).tensor_args)
    kinds = list(itertools.product(DTYPES, SHAPES, (True, False)))
    if len(kinds) ** operands <= count:
        everything = itertools.product(kinds, repeat=operands)
    else:
        draw = random.Random(op.name())
        everything = (tuple(draw.choices(kinds, k=operands)) for _ in range(count))
    return [choice for choice in everything if any(mapped for _, _, mapped in choice)]


def holds_for(op, choice, write=""):
    """Fails unless `vmap` gives what a loop gives, or refuses as it does."""
    given = [[_draw(d, s, 10 * i + k) for k, (d, s, _) in enumerate(choice)] for i in range(BATCH)]
    if write == "out":
        expected = attempt(lambda: op.overloadpacket(*_filled(op, given[0])))[0]
        dtype = expected.dtype if expected is not None else torch.float32
        choice = (*choice, (dtype, (), True))
        for row in given:
            shape = () if expected is None else expected.shape
            row.append(torch.zeros(shape, dtype=dtype))

    def call(*tensors):
        tensors = [t.clone() for t in tensors] if write else tensors
        if write == "out":
            return op(*_filled(op, tensors[:-1]), out=tensors[-1])
        return op(*_filled(op, tensors))

    picked = [
        [row[k] if choice[k][2] else given[0][k] for k in range(len(choice))] for row in given
    ]
    rows = [attempt(lambda row=row: call(*row)) for row in picked]
    error = next((error for _, error in rows if error is not None), None)
    in_dims = tuple(0 if mapped else None for _, _, mapped in choice)
    args = [
        torch.stack(column) if mapped else column[0]
        for column, (_, _, mapped) in zip(zip(*picked, strict=True), choice, strict=True)
    ]
    found, own = attempt(lambda: vmap(call, in_dims)(*args))
    if error is not None:
        assert own is not None, f"gives {found.dtype}, and the loop raises {error!r}"
        assert isinstance(own, (type(error), LaminaError)), f"{own!r} in place of {error!r}"
        return
    if own is not None:
        raise own
    close([found], [torch.stack([row for row, _ in rows])], str(op))


def _filled(op, tensors):
    left = iter(tensors)
    return [next(left) if value is None else value for value in _template(op)]


def attempt(run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, on dtypes that it deprecates
        try:
            return run(), None
        except Exception as error:
            return None, error


def hold(op, count, write=""):
    failures = []
    for choice in choices(op, count):
        try:
            holds_for(op, choice, write)
        except Exception as error:
            text = ", ".join(f"{d}{list(s)}{'*' * mapped}" for d, s, mapped in choice)
            failures.append(f"{text} (mapped: *)\n{type(error).__name__}: {error}")
    assert not failures, f"{len(failures)} fail, such as\n" + "\n".join(failures[:3])


@pytest.mark.slow
@pytest.mark.parametrize("name", overloads(""))
def test_promotion(name):
    hold(overloads("")[name], SPREAD)


@pytest.mark.slow
@pytest.mark.parametrize("name", overloads("in place"))
def test_promotion_in_place(name):
    hold(overloads("in place")[name], SPREAD // 2, "in place")


@pytest.mark.slow
@pytest.mark.parametrize("name", overloads("out"))
def test_promotion_into_out(name):
    hold(overloads("out")[name], SPREAD // 2, "out")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", overloads(""))
def test_promotion_of_all(name):
    hold(overloads("")[name], MANY)


def test_of_three_operands_with_a_mapped_one_without_dims():
    x, low, high = torch.arange(12).reshape(4, 3), torch.rand(4).double(), torch.rand(4, 3)
    half = torch.rand(4).bfloat16()
    for f, args in [
        (torch.clamp, (x, low, high)),
        (torch.addcmul, (x, low, high)),
        (torch.addcmul, (x, half, low)),
        (torch.where, (x > 4, low, high)),
    ]:
        expected = torch.stack([f(*row) for row in zip(*args, strict=True)])
        close([vmap(f)(*args)], [expected], str(f))


@pytest.mark.parametrize("number", [2, 2.5, True, 1j])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", [torch.add, torch.mul, torch.sub, torch.div, torch.pow, torch.where])
def test_with_a_number(f, dtype, number):
    def call(x):
        return f(x > 1, x, number) if f is torch.where else f(x, number)

    for shape in SHAPES:
        xs = torch.stack([_draw(dtype, shape, i) for i in range(BATCH)])
        rows = [attempt(lambda x=x: call(x)) for x in xs]
        found, own = attempt(lambda xs=xs: vmap(call)(xs))
        if rows[0][1] is None:
            expected = torch.stack([row for row, _ in rows])
            assert found.dtype == expected.dtype
            close([_widened(found)], [_widened(expected)], str(f))
        else:
            assert type(own) is type(rows[0][1])
