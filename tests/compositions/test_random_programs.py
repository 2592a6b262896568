"""Random programs under random stacks of transforms agree with plain PyTorch.

Every case is printed as code when it fails: the program, then the transforms, innermost first.
The seeds split the search, so that workers share it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings

import lamina
from tests.reference import reference
from tests.strategies.program import Program, constant
from tests.strategies.stacks import Grad, Hessian, Jacobian, Jvp, Stack, Transform, Vjp, Vmap, cases

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def transformed(stack: Stack, f: Function) -> Function:
    """The function that the stack makes of `f`, by Lamina."""
    for transform in stack.transforms:
        f = _apply(transform, f)
    return f


def _apply(transform: Transform, f: Function) -> Function:
    match transform:
        case Vmap():
            return _mapped(transform, f)
        case Grad(argnums, captures):

            def scalar(x, y):
                return f(x, y).sin().sum()

            return _one_argument(lamina.grad, scalar, argnums, captures)
        case Vjp(argnums, captures):
            return _one_argument(_pulled_back, f, argnums, captures)
        case Jvp(argnums):
            return _pushed_forward(f, argnums)
        case Jacobian(mode, argnums, captures, chunk_size):
            jacobian = getattr(lamina, mode)

            def transform_one(g, i):
                return jacobian(g, i, chunk_size=chunk_size)

            return _one_argument(transform_one, f, argnums, captures)
        case Hessian(argnums, captures):
            return _one_argument(lamina.hessian, f, argnums, captures)
    raise AssertionError(transform)


def _one_argument(make: Callable, f: Function, argnums: int, captures: bool) -> Function:
    """Applies `make` in one argument; the other is passed along, or captured by the closure."""
    if not captures:
        return make(f, argnums)
    if argnums == 0:
        return lambda x, y: make(lambda x: f(x, y), 0)(x)
    return lambda x, y: make(lambda y: f(x, y), 0)(y)


def _mapped(transform: Vmap, f: Function) -> Function:
    in_dims, captures = transform.in_dims, transform.captures

    def vmap(g, in_dims):
        return lamina.vmap(g, in_dims, transform.out_dims, chunk_size=transform.chunk_size)

    if captures and in_dims[1] is None:
        return lambda x, y: vmap(lambda x: f(x, y), in_dims[0])(x)
    if captures and in_dims[0] is None:
        return lambda x, y: vmap(lambda y: f(x, y), in_dims[1])(y)
    return vmap(f, in_dims)


def _pulled_back(f: Callable, argnums: int) -> Callable:
    def pulled_back(*args):
        def of_one(arg):
            return f(*args[:argnums], arg, *args[argnums + 1 :])

        out, pullback = lamina.vjp(of_one, args[argnums])
        return pullback(out.cos())[0]

    return pulled_back


def _pushed_forward(f: Function, argnums: tuple[int, ...]) -> Function:
    def pushed_forward(x, y):
        args = (x, y)

        def of_some(*some):
            full = list(args)
            for i, arg in zip(argnums, some, strict=True):
                full[i] = arg
            return f(*full)

        primals = tuple(args[i] for i in argnums)
        out, out_t = lamina.jvp(of_some, primals, tuple(p.sin() for p in primals))
        return out + out_t

    return pushed_forward


def check(program: Program, stack: Stack) -> None:
    """Fails unless both sides agree, to within rounding of the largest entry."""
    note(f"program:{program!r}\nstack:{stack!r}")
    x, y = 0.8 * constant(-3, stack.x_shape), 0.8 * constant(-4, stack.y_shape)
    expected = reference(stack, program.compile(plain=True))(x.clone(), y.clone()).detach()
    actual = transformed(stack, program.compile())(x, y)
    assert tuple(expected.shape) == stack.out_shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8 * scale)


def search(part: int, examples: int, fills: bool) -> None:
    """Checks `examples` random cases; `part` seeds the search."""

    @seed(part)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(cases(fills=fills))
    def run(case):
        check(*case)

    run()


@pytest.mark.parametrize("part", range(4))
def test_random_programs(part):
    search(part, examples=90, fills=False)


@pytest.mark.parametrize("part", range(2))
def test_random_programs_that_fill_buffers(part):
    search(100 + part, examples=60, fills=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(8))
def test_many_random_programs(part):
    search(200 + part, examples=300, fills=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(4))
def test_many_random_programs_that_fill_buffers(part):
    search(300 + part, examples=150, fills=True)
