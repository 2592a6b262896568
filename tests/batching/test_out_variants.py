"""`out=` under the transforms: written under vmap, and followed by derivatives.

Plain PyTorch refuses to differentiate through `out=`; here it is the op followed by a write. The
oracles are loops of plain PyTorch, and `torch.autograd` on the op without `out=`.
"""

from __future__ import annotations

import pytest
import torch

from lamina import grad, jvp, vmap
from lamina_core.errors import MutationError, RandomnessError
from tests.errors.saying import said

F64 = torch.float64
PICKED = torch.tensor([2, 0])


def rand(*shape):
    return torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.5


X, Y = rand(2, 3), rand(2, 3).flip(1)
A, B = rand(2, 3, 4), rand(2, 4, 3)

# (op, its operands, the shape and dtype of out)
OPS = {
    "add": (torch.add, (X, Y), (3,), F64),
    "argmax": (lambda x, out: torch.argmax(x, 0, out=out), (A,), (4,), torch.int64),
    "bernoulli of 0 and 1": (
        lambda x, out: torch.bernoulli(x.round() % 2, out=out),
        (X,),
        (3,),
        F64,
    ),
    "cat": (lambda x, y, out: torch.cat([x, y], out=out), (X, Y), (6,), F64),
    "clamp": (lambda x, out: torch.clamp(x, 0.7, 1.2, out=out), (X,), (3,), F64),
    "cumsum": (lambda x, out: torch.cumsum(x, 0, out=out), (A,), (3, 4), F64),
    "dot": (torch.dot, (X, Y), (), F64),
    "gather": (lambda x, out: torch.gather(x, 0, PICKED, out=out), (X,), (2,), F64),
    "gt": (torch.gt, (X, Y), (3,), torch.bool),
    "index_select": (lambda x, out: torch.index_select(x, 0, PICKED, out=out), (A,), (2, 4), F64),
    "inv": (
        lambda x, y, out: torch.linalg.inv(x @ y + 3 * torch.eye(3), out=out),
        (A, B),
        (3, 3),
        F64,
    ),
    "matmul": (torch.matmul, (A, B), (3, 3), F64),
    "mean": (lambda x, out: torch.mean(x, 0, out=out), (A,), (4,), F64),
    "sin": (torch.sin, (X,), (3,), F64),
    "stack": (lambda x, y, out: torch.stack([x, y], out=out), (X, Y), (2, 3), F64),
    "std": (lambda x, out: torch.std(x, 0, out=out), (A,), (4,), F64),
    "sum": (lambda x, out: torch.sum(x, 0, out=out), (A,), (4,), F64),
    "tensordot": (lambda x, y, out: torch.tensordot(x, y, 1, out=out), (A, B), (3, 3), F64),
    "where": (lambda x, y, out: torch.where(x > y, x, y, out=out), (X, Y), (3,), F64),
}
DIFFERENTIABLE = [n for n, case in OPS.items() if case[3] is F64 and "bernoulli" not in n]


def stacked(rows):
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_out_made_inside(name):
    op, operands, shape, dtype = OPS[name]

    def f(*xs):
        out = torch.zeros(shape, dtype=dtype)
        whole = torch.zeros(2, *shape, dtype=dtype)
        answer = op(*xs, out=out)
        op(*xs, out=whole[1])
        return answer, out, whole, answer is out

    *found, is_itself = vmap(f, randomness="same")(*operands)
    assert is_itself
    expected = stacked([f(*xs)[:3] for xs in zip(*operands, strict=True)])
    torch.testing.assert_close(tuple(found), expected)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dim", [0, -1])
def test_out_that_is_mapped_is_written_for_the_caller(name, dim):
    op, operands, shape, dtype = OPS[name]
    out = torch.zeros(2, *shape, dtype=dtype).movedim(0, dim).contiguous()
    vmap(lambda out, *xs: op(*xs, out=out), in_dims=(dim, *[0] * len(operands)), randomness="same")(
        out, *operands
    )
    rows = [op(*xs, out=torch.zeros(shape, dtype=dtype)) for xs in zip(*operands, strict=True)]
    torch.testing.assert_close(out.movedim(dim, 0), torch.stack(rows))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_go_through_out(name):
    op, operands, shape, dtype = OPS[name]
    xs = [x[0] for x in operands]
    positions = tuple(range(len(xs)))

    def f(*xs):
        out = torch.full(shape, 2.0, dtype=dtype)
        before = out * 3
        op(*xs, out=out)
        return (out.square() + before).sum()

    def without(*xs):
        fresh = [x.clone() for x in xs]  # `out=None` is what every one of these ops takes
        return (op(*fresh, out=None).square() + 6).sum()

    leaves = [x.clone().requires_grad_() for x in xs]
    expected = torch.autograd.grad(without(*leaves), leaves)
    torch.testing.assert_close(grad(f, positions)(*xs), expected)
    tangents = tuple(x.cos() for x in xs)
    wanted = sum((g * t).sum() for g, t in zip(expected, tangents, strict=True))
    torch.testing.assert_close(jvp(f, tuple(xs), tangents)[1], wanted)
    rows = [
        torch.autograd.grad(without(*row), row)
        for row in ([x.clone().requires_grad_() for x in r] for r in zip(*operands, strict=True))
    ]
    torch.testing.assert_close(vmap(grad(f, positions))(*operands), stacked(rows))


def test_what_out_held_before_is_gone():
    def f(x):
        out = x * 2
        torch.sin(torch.ones(3, dtype=F64), out=out)
        return out.sum() + x.sum()

    torch.testing.assert_close(grad(f)(X[0]), torch.ones(3, dtype=F64))


def test_out_may_be_an_operand():
    def f(x):
        mine = x * 2
        torch.add(mine, 1, out=mine)
        return mine

    torch.testing.assert_close(vmap(f)(X), 2 * X + 1)
    torch.testing.assert_close(grad(lambda x: f(x).square().sum())(X[0]), 4 * (2 * X[0] + 1))


SEVERAL = {
    "max": (lambda x, out: torch.max(x, 0, out=out), (4,), (4,)),
    "sort": (lambda x, out: torch.sort(x, 0, out=out), (3, 4), (3, 4)),
    "topk": (lambda x, out: torch.topk(x, 2, 0, out=out), (2, 4), (2, 4)),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_outs(name):
    op, first, second = SEVERAL[name]

    def f(x):
        values, indices = torch.zeros(first, dtype=F64), torch.zeros(second, dtype=torch.int64)
        op(x, out=(values, indices))
        return values, indices

    torch.testing.assert_close(vmap(f)(A), stacked([f(x) for x in A]))
    leaf = A[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(op(leaf, out=None)[0].square().sum(), leaf)
    torch.testing.assert_close(grad(lambda x: f(x)[0].square().sum())(A[0]), expected)


FACTORIES = {
    "arange": (lambda out: torch.arange(3, out=out), (3,)),
    "arange of a step": (lambda out: torch.arange(1, 2, 0.4, out=out), (3,)),
    "eye": (lambda out: torch.eye(3, out=out), (3, 3)),
    "full": (lambda out: torch.full((3,), 2.5, out=out), (3,)),
    "linspace": (lambda out: torch.linspace(0, 1, 3, out=out), (3,)),
    "logspace": (lambda out: torch.logspace(0, 1, 3, out=out), (3,)),
    "ones": (lambda out: torch.ones(3, out=out), (3,)),
    "zeros": (lambda out: torch.zeros(3, out=out), (3,)),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_the_out_of_a_factory(name):
    make, shape = FACTORIES[name]

    def f(x):
        out = torch.full(shape, 7.0, dtype=F64)
        make(out)
        return out * x

    torch.testing.assert_close(vmap(f)(X), torch.stack([f(x) for x in X]))
    torch.testing.assert_close(
        grad(lambda x: f(x).sum())(X[0]), f(torch.ones(3)).reshape(-1, 3).sum(0)
    )


def test_the_out_of_a_random_factory():
    def f(x):
        out = torch.zeros(3, dtype=F64)
        torch.randn(3, out=out)
        return out + x * 0

    torch.manual_seed(0)
    found = vmap(f, randomness="different")(X)
    torch.manual_seed(0)
    torch.testing.assert_close(found, torch.randn(2, 3, dtype=F64))
    same = vmap(f, randomness="same")(X)
    assert torch.equal(same[0], same[1])
    with pytest.raises(RandomnessError):
        vmap(f)(X)


# -- what is refused -------------------------------------------------------------------------------


def test_a_captured_out_is_an_error():
    out = torch.zeros(3, dtype=F64)
    text = said(MutationError, lambda: vmap(lambda x: torch.sin(x, out=out))(X))
    assert text.startswith("aten.sin.out writes a value of this transform to a tensor captured")
    assert not out.any()
    with pytest.raises(MutationError):
        vmap(lambda x, out: torch.sin(x, out=out), in_dims=(0, None))(X, out)
    with pytest.raises(MutationError):
        grad(lambda x: torch.sin(x, out=out).sum())(X[0])


@pytest.mark.parametrize("size", [0, 2])
def test_an_out_of_another_shape_is_an_error(size):
    text = said(
        MutationError,
        lambda: vmap(lambda x: torch.sin(x, out=torch.empty(size, dtype=F64)))(X),
    )
    assert f"of shape [{size}]" in text


def test_a_result_is_cast_only_where_pytorch_casts_it():
    found = vmap(lambda x: torch.sin(x.float(), out=torch.zeros(3, dtype=F64)))(X)
    torch.testing.assert_close(found, X.float().sin().double())

    def f(x):
        return torch.sin(x, out=torch.zeros(3, dtype=torch.int64))

    with pytest.raises(RuntimeError, match="can't be cast"):
        f(X[0])
    assert "torch.float64, which can't be cast to the torch.int64" in said(
        MutationError, lambda: vmap(f)(X)
    )


@pytest.mark.parametrize("transform", [vmap, lambda f: vmap(grad(f))], ids=["vmap", "vmap(grad)"])
def test_neither_does_a_write_in_place(transform):
    def f(x):
        return torch.zeros(3, dtype=torch.int64).add_(x).sum() * x.sum()

    with pytest.raises(RuntimeError, match="can't be cast"):
        f(X[0])
    with pytest.raises(MutationError, match="can't be cast"):
        transform(f)(X)
