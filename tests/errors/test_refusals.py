"""What an op refuses alone it refuses in a transform, in the same words, and says where."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lamina import grad, jvp, vmap
from tests.refused import answered, operators

BATCH = 3
HALF, SINGLE, DOUBLE, WHOLE = torch.bfloat16, torch.float32, torch.float64, torch.int64


def ones(*shape, dtype=SINGLE):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize("name", operators())
def test_errors_of_the_table(name):
    found = answered(name)
    assert not found, "\n".join(found[:5])


CALLS = {
    "inv": (torch.linalg.inv, ones(3)),
    "svdvals": (torch.linalg.svdvals, ones(3)),
    "eigvalsh": (torch.linalg.eigvalsh, ones(3)),
    "slogdet": (torch.linalg.slogdet, ones(3)),
    "det": (torch.linalg.det, ones(3)),
    "cholesky": (torch.linalg.cholesky, ones(3)),
    "solve": (torch.linalg.solve, ones(3), ones(3)),
    "layer_norm": (lambda x: F.layer_norm(x, (3, 4)), ones(4)),
    "rms_norm": (lambda x: F.rms_norm(x, (3, 4)), ones(4)),
    "trace of a vector": (torch.trace, ones(3)),
    "trace of matrices": (torch.trace, ones(2, 3, 3)),
    "mm": (torch.mm, ones(3), ones(3, 3)),
    "mm of matrices": (torch.mm, ones(2, 3, 3), ones(3, 3)),
    "bmm": (torch.bmm, ones(3, 3), ones(3, 3)),
    "mv": (torch.mv, ones(3), ones(3)),
    "dot": (torch.dot, ones(3, 3), ones(3, 3)),
    "addmm": (torch.addmm, ones(3), ones(3), ones(3, 3)),
    "cross": (torch.linalg.cross, ones(4), ones(4)),
    "block_diag": (torch.block_diag, ones(2, 2, 2)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), ones(4, 4)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), ones(4, 4)),
    "conv2d": (F.conv2d, ones(4, 4), ones(1, 1, 2, 2)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), ones(4, 4)),
    "unfold": (lambda x: F.unfold(x, 2), ones(4, 4)),
    "fold": (lambda x: F.fold(x, (3, 3), 2), ones(4)),
    "linear": (F.linear, ones(2, 4), ones(2, 2, 4)),
    "group_norm": (lambda x: F.group_norm(x, 2), ones(4)),
    "cross_entropy": (F.cross_entropy, ones(2, 4), torch.ones(3, dtype=WHOLE)),
    "tril": (torch.tril, ones(4)),
    "diagonal": (torch.diagonal, ones(4)),
    "t": (torch.t, ones(2, 3, 4)),
    "squeeze": (lambda x: torch.squeeze(x, 2), ones(2, 1)),
    "roll": (lambda x: torch.roll(x, (1, 1), (0,)), ones(2, 1)),
    "cat": (lambda x, y: torch.cat([x, y]), ones(2, 2), ones(2)),
    "stack": (lambda x, y: torch.stack([x, y]), ones(2, 2), ones(2)),
    "index_add": (lambda x, y: x.index_add(0, torch.tensor([0]), y), ones(2), ones(2, 2)),
    "view of a transposed tensor": (lambda x: x.t().view(-1), ones(2, 3)),
    "baddbmm of two dtypes": (
        torch.baddbmm,
        ones(1, 2, 2, dtype=WHOLE),
        ones(1, 2, 2),
        ones(1, 2, 2),
    ),
    "addmv of two dtypes": (torch.addmv, ones(2, dtype=HALF), ones(2, 2), ones(2)),
    "mm of two dtypes": (torch.mm, ones(2, 2, dtype=DOUBLE), ones(2, 2)),
    "masked_scatter of two dtypes": (
        lambda x, y: x.masked_scatter(torch.tensor([True, False]), y),
        ones(2),
        ones(2, dtype=DOUBLE),
    ),
    "complex of two dtypes": (torch.complex, ones(2), ones(2, dtype=DOUBLE)),
    "complex of two dtypes and ranks": (torch.complex, ones(), ones(2, dtype=DOUBLE)),
    "dot of two dtypes": (torch.dot, ones(2), ones(2, dtype=DOUBLE)),
    "linear of two dtypes": (F.linear, ones(2), ones(2, 2, dtype=DOUBLE)),
    "index of floats": (lambda x, i: x[i], ones(3), ones(2)),
    "gather of floats": (lambda x, i: x.gather(0, i), ones(3), ones(2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    f, *args = CALLS[name]
    try:
        out = f(*args)
    except (RuntimeError, ValueError, IndexError) as error:
        own = error
    else:  # some versions of torch take some of them
        same = vmap(f)(*[torch.stack([a] * BATCH) for a in args])
        torch.testing.assert_close(same, torch.stack([out] * BATCH))
        return
    choices = {tuple(range(len(args))), *((i,) for i in range(len(args)))}
    for mapped in choices:
        for last in (False, True):
            at = [(a.dim() if last else 0) if i in mapped else None for i, a in enumerate(args)]
            batched = [
                a if d is None else torch.stack([a] * BATCH, d)
                for a, d in zip(args, at, strict=True)
            ]
            with pytest.raises(type(own)):
                vmap(f, tuple(at))(*batched)
    wide = [a for a in args if a.is_floating_point()]
    if len(wide) == len(args):
        with pytest.raises(type(own)):
            grad(lambda *args: f(*args).sum(), tuple(range(len(args))))(*args)
        with pytest.raises(type(own)):
            jvp(f, tuple(args), tuple(args))


def test_the_words_are_those_of_the_op_and_the_place_is_named():
    with pytest.raises(RuntimeError) as alone:
        torch.linalg.inv(ones(3))
    with pytest.raises(RuntimeError) as inside:
        vmap(torch.linalg.inv)(ones(3, 3))
    assert str(inside.value) == str(alone.value)
    assert inside.value.__notes__ == [
        "in aten.linalg_inv.default(f32[3])\n"
        "  while interpreting at level 1: vmap(batch_size=3, randomness='error')"
    ]


def test_a_call_that_was_taken_once_is_refused_with_other_shapes():
    f = vmap(torch.linalg.inv)
    f(torch.eye(3).expand(2, 3, 3))
    with pytest.raises(RuntimeError, match="at least 2"):
        f(ones(3, 3))
    f(torch.eye(3).expand(2, 3, 3))


# A call that an op takes, and one that differs in a number alone, which it refuses.
NUMBERS = {
    "renorm": (lambda x, p: torch.renorm(x, p, 0, 1.0), 2.0, -1.0),
    "histc": (lambda x, high: torch.histc(x, 4, 0.0, high), 1.0, -1.0),
    "histogram": (lambda x, high: torch.histogram(x, 4, range=(0.0, high))[0], 1.0, -1.0),
    "quantile": (lambda x, q: torch.quantile(x, q, 0), 0.5, 1.5),
    "cdist": (lambda x, p: torch.cdist(x, x + 1, p), 2.0, -1.0),
    "huber_loss": (lambda x, delta: F.huber_loss(x, 2 * x, delta=delta), 1.0, -1.0),
    "native_dropout": (lambda x, p: torch.native_dropout(x, p, True)[0], 0.5, 1.5),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_call_that_was_taken_once_is_refused_with_another_number(name):
    f, good, bad = NUMBERS[name]
    x = torch.linspace(0.1, 0.9, 9).reshape(3, 3)
    f(x, good)
    with pytest.raises(RuntimeError) as own:
        f(x, bad)
    under = [lambda p: vmap(lambda x: f(x, p), randomness="different")(x.expand(2, 3, 3))]
    if name not in ("histc", "histogram"):
        under.append(lambda p: jvp(lambda x: f(x, p), (x,), (x,)))
    for transform in under:
        transform(good)
        with pytest.raises(type(own.value)):
            transform(bad)


def test_what_user_code_raises_inside_an_op_comes_as_it_is():
    class Stop(Exception):
        """What a hook raises."""

    def pack(tensor):
        raise Stop

    def f(x):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return x.sin().exp()

    with pytest.raises(Stop) as caught:
        grad(f)(torch.tensor(1.0))
    assert not hasattr(caught.value, "__notes__")
