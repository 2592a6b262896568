"""`x[i]` and `x[i] = v` where `i` has no dims and is another number for each example.

The oracle is the loop over the examples, where PyTorch reads such an index as one Python number.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from lamina import grad, hessian, jacfwd, jacrev, jvp, vmap
from lamina_core.errors import DataDependentError, MutationError

B = 4
X = torch.linspace(-2, 3, B * 3 * 5, dtype=torch.float64).reshape(B, 3, 5).sin()
I = torch.tensor([0, 2, 1, -1])  # noqa: E741 - as in x[i]
J = torch.tensor([4, 0, -2, 3])
ROWS = torch.tensor([0, 1, 1])


def _start(j):
    """A place, counted from either end, that 3 of 5 elements follow."""
    return j % 3 - 5 * (j % 2)


def written(write):
    """A function that gives a copy of `x` after `write(copy, i, j)`."""

    def function(x, i, j):
        y = x.clone()
        write(y, i, j)
        return y

    return function


def _put(*index):
    """`y[index] = value` as a function; the index is a function of i and j."""

    def write(y, i, j):
        y[index[0](i, j)] = index[1](y, i, j)

    return written(write)


def _views(x, i, j):
    """A view that is looked at after what it views has been written to, and `i` as well."""
    y, i = x.clone(), i.clone()
    row = y[i]
    i += 1
    y *= 2
    return row * y[i.clamp(max=2)]


READS = {
    "x[i]": lambda x, i, j: x[i],
    "x[..., j]": lambda x, i, j: x[..., j],
    "x[i, j]": lambda x, i, j: x[i, j],
    "x[i][j]": lambda x, i, j: x[i][j],
    "x[i, :, None]": lambda x, i, j: x[i, :, None],
    "x[None, i, ..., j]": lambda x, i, j: x[None, i, ..., j],
    "x[i, 1:4]": lambda x, i, j: x[i, 1:4],
    "x[True, i]": lambda x, i, j: x[True, i],
    "x[-1, j]": lambda x, i, j: x[-1, j],
    "x[rows, j]": lambda x, i, j: x[ROWS, j],
    "x[[0, 2], j]": lambda x, i, j: x[[0, 2], j],
    "x[i, None, rows]": lambda x, i, j: x[i, None, ROWS],
    "x[i, mask]": lambda x, i, j: x[i, torch.tensor([True, False, True, True, False])],
    "x[i, bools]": lambda x, i, j: x[i, [True, False, True, True, False]],
    "x[argmax]": lambda x, i, j: x[x[:, 0].argmax()],
    "x[i + 0 * j]": lambda x, i, j: x[i + 0 * j],
    "narrow": lambda x, i, j: torch.narrow(x, 1, _start(j), 3),
    "x.narrow": lambda x, i, j: x.narrow(0, i, 1),
    "index_select": lambda x, i, j: x.index_select(1, j % 5),
    "take": lambda x, i, j: x.take(i),
    "a view after writes": _views,
}
WRITES = {
    "y[i] = 0": _put(lambda i, j: i, lambda y, i, j: 0.0),
    "y[i] = row": _put(lambda i, j: i, lambda y, i, j: torch.arange(5.0)),
    "y[i, j] = y[j, i]": _put(lambda i, j: (i, j), lambda y, i, j: 2 * y[i, j]),
    "y[..., j] = column": _put(lambda i, j: (..., j), lambda y, i, j: y[:, 0].cos()),
    "y[::2, j] = y[1:, j]": _put(lambda i, j: (slice(None, None, 2), j), lambda y, i, j: y[1:, j]),
    "y[i, rows] = 1": _put(lambda i, j: (i, ROWS), lambda y, i, j: 1),
    "y[flag] = 1": _put(lambda i, j: i > 0, lambda y, i, j: 1.0),
    "y[flag, 1] = 1": _put(lambda i, j: (i > 0, 1), lambda y, i, j: 1.0),
    "y[byte] = 1": _put(lambda i, j: (i > 0).to(torch.uint8), lambda y, i, j: 1.0),
    "y[i] += j": written(lambda y, i, j: y.__setitem__(i, y[i].add_(j))),
    "y[i].mul_": written(lambda y, i, j: y[i].mul_(3)),
    "y[i][j].add_": written(lambda y, i, j: y[i][j].add_(1)),
    "y.narrow.zero_": written(lambda y, i, j: y.narrow(1, _start(j), 3).zero_()),
}
PROGRAMS = {**READS, **WRITES}


def _choices():
    for dims in itertools.product((0, None), repeat=3):
        if dims != (None, None, None):
            args = [t if dim == 0 else t[1] for t, dim in zip((X, I, J), dims, strict=True)]
            yield dims, args


def _looped(function, dims, args):
    pairs = list(zip(args, dims, strict=True))
    return torch.stack([function(*[t if d is None else t[b] for t, d in pairs]) for b in range(B)])


UNDER = {
    "vmap": lambda f: f,
    "vmap(grad)": lambda f: grad(lambda x, *ij: f(x, *ij).sin().sum()),
    "vmap(jvp)": lambda f: lambda x, *ij: jvp(lambda x: f(x, *ij), (x,), (x.cos(),))[1],
    "vmap(hessian)": lambda f: lambda x, *ij: hessian(lambda x: f(x, *ij).sin().sum())(x),
}


@pytest.mark.parametrize(
    "under",
    [pytest.param(n, marks=pytest.mark.exhaustive if n == "vmap(hessian)" else ()) for n in UNDER],
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_each_example_has_its_own_place(name, under):
    function = UNDER[under](PROGRAMS[name])
    for dims, args in _choices():
        torch.testing.assert_close(vmap(function, dims)(*args), _looped(function, dims, args))


@pytest.mark.parametrize("name", PROGRAMS)
def test_two_levels_of_examples(name):
    function = PROGRAMS[name]
    xs, j = torch.stack([X, X.cos()]), torch.tensor([2, 1])
    pairs = list(zip(xs, j, strict=True))
    want = torch.stack([_looped(function, (0, 0, None), (x, I, k)) for x, k in pairs])
    torch.testing.assert_close(vmap(vmap(function, (0, 0, None)), (0, None, 0))(xs, I, j), want)
    swapped = vmap(vmap(function, (0, None, 0)), (1, 0, None))(xs, I, j)
    torch.testing.assert_close(swapped, want.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint16])
def test_integers_of_every_width(dtype):
    numbers = torch.tensor([0, 2, 1, 1]).to(dtype)
    assert torch.equal(
        vmap(lambda x, i: x[i])(X, numbers), _looped(lambda x, i: x[i], (0, 0), (X, numbers))
    )


def test_captured_tensors_and_parameters():
    table = X[0]
    assert torch.equal(vmap(lambda i: table[i])(I), table[I])
    assert torch.equal(vmap(lambda i, j: table[i, j])(I, J), table[I, J])
    weight = torch.nn.Parameter(table.clone())
    (got,) = torch.autograd.grad(vmap(lambda i: weight[i])(I).sin().sum(), weight)
    (want,) = torch.autograd.grad(weight[I].sin().sum(), weight)
    torch.testing.assert_close(got, want)
    scale = torch.tensor(2.0, dtype=table.dtype)
    torch.testing.assert_close(
        grad(lambda s: vmap(lambda i: (s * table)[i])(I).sum())(scale), table[I].sum()
    )


def test_the_loss_of_a_label():
    """The first thing that many try: per-sample gradients and jacobians of -log p[y]."""
    w = X[0]
    xs, ys = X[:, 0], I % 3

    def loss(w, x, y):
        return -F.log_softmax(w @ x, -1)[y]

    want = torch.stack([grad(loss)(w, x, int(y)) for x, y in zip(xs, ys, strict=True)])
    torch.testing.assert_close(vmap(grad(loss), (None, 0, 0))(w, xs, ys), want)
    for jacobian in (jacrev, jacfwd):
        got = jacobian(lambda w: vmap(loss, (None, 0, 0))(w, xs, ys))(w)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, i: x[i],
        lambda x, i: x.narrow(0, i, 1),
        lambda x, i: x.narrow(0, i, 2),
        lambda x, i: x.clone().__setitem__(i, 0.0),
    ],
)
@pytest.mark.parametrize("far", [3, -4, 7, -9])
def test_out_of_range(function, far):
    numbers = torch.tensor([0, far, 1, 1])
    for tensor, dim in ((X, 0), (X[0], None)):
        with pytest.raises((IndexError, RuntimeError), match=r"out of|exceeds"):
            function(X[0], torch.tensor(far))
        with pytest.raises((IndexError, RuntimeError), match=r"out of|exceeds"):
            vmap(function, (dim, 0))(tensor, numbers)


def test_too_many_indices():
    for index in (lambda i: (i, i, i), lambda i: (..., i, i, None, i)):
        with pytest.raises(IndexError, match="too many indices"):
            vmap(lambda x, i: x[index(i)])(X, I)  # noqa: B023 - called at once


@pytest.mark.parametrize(
    "write",
    [
        lambda t, i: t.__setitem__(i, 1.0),
        lambda t, i: t.__setitem__((0, i), t[i, 0]),
        lambda t, i: t[i].zero_(),
        lambda t, i: t[i, 2:].add_(1),
        lambda t, i: t.narrow(0, i, 1).zero_(),
    ],
)
def test_a_captured_tensor_is_not_written_to(write):
    table = X[0].clone()
    with pytest.raises(MutationError, match="captured"):
        vmap(lambda i: write(table, i))(I)
    with pytest.raises(MutationError, match="captured"):
        vmap(lambda t, i: grad(lambda s: (write(t, i), s)[1])(i * 1.0), (None, 0))(table, I)
    assert torch.equal(table, X[0])


@pytest.mark.parametrize(
    "read",
    [
        lambda x, i: x[i:],
        lambda x, i: x[:, i : i + 1],
        lambda x, i: [1, 2, 3][i],
        lambda x, i: list(range(i)),
    ],
)
def test_what_needs_one_number_says_what_does_not(read):
    with pytest.raises(DataDependentError, match="narrow"):
        vmap(read)(X, I)
    with pytest.raises(DataDependentError, match="narrow"):
        vmap(lambda x, i: grad(lambda x: (read(x, i), x.sum())[1])(x))(X, I)


def test_a_mask_without_dims_has_no_shape_to_give():
    with pytest.raises(DataDependentError):
        vmap(lambda x, i: x[i > 0])(X, I)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: F.cross_entropy(x, y, torch.ones(3, dtype=x.dtype)),
        lambda x, y: F.nll_loss(x, y),
        lambda x, y: F.one_hot(y, 4),
        lambda x, y: F.dropout(y * 1.0, 0.5, training=False),
        lambda x, y: F.embedding(y, x[:, None]),
        lambda x, y: torch.norm(y * 1.0),
        lambda x, y: torch.einsum(",->", y, y),
    ],
)
def test_functions_of_python_take_a_label(call):
    """They look whether an argument has a `__torch_function__`, and then at its class."""
    xs, ys = X[:, 0, :3], I % 3
    want = _looped(call, (0, 0), (xs, ys))
    torch.testing.assert_close(vmap(call)(xs, ys), want)
    got = vmap(lambda x, y: grad(lambda x: call(x, y).sum() * x.sum())(x))(xs, ys)
    assert got.shape == xs.shape
