"""Ops that PyTorch composes of others and that have a batching rule of their own.

The oracle is the loop over the examples, for every choice of who is batched; what an op refuses of
an example has to be refused of a batch of them too, though with one dim more it would pass.
"""

import pytest
import torch
from torch.nn import functional as F

import lamina
from tests.batching.test_matmul_conv_norm import WHERE, agree, batches

fft = torch.fft


@pytest.fixture(autouse=True)
def _no_loops(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "error")
    monkeypatch.setattr(lamina.config, "debug", 1)


CASES = {
    "broadcast_tensors": (lambda x, y: torch.broadcast_tensors(x, y), (2, 1, 4), (3, 1)),
    "cdist": (torch.cdist, (2, 3, 4), (5, 4)),
    "chunk": (lambda x: x.chunk(3, -2), (2, 5, 4)),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, 2, 1), (2, 3, 7), (4, 3, 2), (4,)),
    "conv2d": (F.conv2d, (2, 3, 5, 6), (4, 3, 2, 1), (4,)),
    "conv2d of one image": (F.conv2d, (3, 5, 6), (4, 3, 2, 1), (4,)),
    "conv2d, same": (lambda x, w: F.conv2d(x, w, padding="same"), (2, 3, 5, 6), (4, 3, 1, 3)),
    "conv_transpose2d": (F.conv_transpose2d, (2, 3, 5, 6), (3, 4, 2, 1), (4,)),
    "fft2": (lambda x: fft.fft2(x, (3, 7)), (2, 4, 6)),
    "fftn": (lambda x: fft.fftn(x, (3,)), (2, 4, 6)),
    "fftn of all": (fft.fftn, (2, 4, 6)),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (2, 4, 3), (4,), (4,)),
    "instance_norm": (
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        (2, 4, 3),
        (4,),
        (4,),
    ),
    "irfft": (lambda x: fft.irfft(x, 5, 0, "ortho"), (4, 3)),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), (2, 3, 6)),
    "max_pool1d of one": (lambda x: F.max_pool1d(x, 2), (3, 6)),
    "pad, circular": (lambda x: F.pad(x, (1, 2), mode="circular"), (2, 3, 4)),
    "pad, constant": (lambda x: F.pad(x, (1, 2, 0, 1), value=3.0), (2, 3, 4)),
    "pad, reflected": (lambda x: F.pad(x, (1, 2), mode="reflect"), (3, 4)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), (2, 3, 4), (4,)),
    "solve": (torch.linalg.solve, (3, 3), (3, 2)),
    "solve for a vector": (torch.linalg.solve, (3, 3), (3,)),
    "solve from the right": (lambda a, b: torch.linalg.solve(a, b, left=False), (3, 3), (2, 3)),
    "unflatten": (lambda x: x.unflatten(-2, (3, 2)), (2, 6, 4)),
    "var": (lambda x: x.var((0, 2), unbiased=False), (2, 3, 4)),
    "with logits": (F.binary_cross_entropy_with_logits, (2, 3), (2, 3), (3,)),
}


@WHERE
@pytest.mark.parametrize("name", CASES)
def test_composites(name, where):
    f, *shapes = CASES[name]
    for args, in_dims in batches(*shapes, where=where):
        agree(f, args, in_dims)


STACKED = {
    "alike": ((2, 4, 5), (2, 3, 5)),
    "x broadcast": ((1, 4, 5), (2, 3, 5)),
    "y broadcast": ((2, 4, 5), (1, 3, 5)),
    "x of fewer dims": ((4, 5), (2, 3, 5)),
    "y of fewer dims": ((2, 1, 4, 5), (2, 3, 5)),
    "no stack": ((1, 4, 5), (0, 3, 5)),
    "no rows": ((4, 5), (2, 0, 5)),
    "no columns": ((1, 4, 0), (2, 3, 0)),
}


@WHERE
@pytest.mark.parametrize("p", [0.0, 1.5, 2.0])
@pytest.mark.parametrize("name", STACKED)
def test_backward_of_distances(name, p, where):
    x, y = STACKED[name]
    ct = torch.cdist(torch.ones(x), torch.ones(y)).shape

    def pulled(ct, x, y):
        return torch.ops.aten._cdist_backward(ct, x, y, p, torch.cdist(x, y, p))

    for args, in_dims in batches(ct, x, y, where=where):
        agree(pulled, args, in_dims)
        # As ordinary ops, which derivatives need, the shape is that of the op too.
        one = [a if d is None else a.select(d, 0) for a, d in zip(args, in_dims, strict=True)]
        near = lamina.vjp(pulled, *one)[0]
        torch.testing.assert_close(near, pulled(*one))


@WHERE
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(4, 5), (5,), (4, 5, 2)], ids=str)
def test_cross_entropy(shape, reduction, where):
    places = (*shape[:-2], *shape[-1:]) if len(shape) > 2 else shape[:-1]
    for (x,), dims in batches(shape, where=where):
        labels = torch.randint(5, (3, *places))
        if places:
            labels.view(3, -1)[1, 0] = -100

        def loss(x, y):
            return F.cross_entropy(x, y, reduction=reduction)

        agree(loss, (x, labels), (*dims, 0))
        agree(loss, (x, labels[0]), (*dims, None))
        agree(loss, (x.select(dims[0], 0), labels), (None, 0))


@pytest.mark.parametrize(
    ("f", "shape"),
    [
        (lambda x: F.conv2d(x, torch.ones(2, 3, 1, 1)), (3, 4)),
        (lambda x: F.group_norm(x, 1), (3,)),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), (3, 4)),
        (lambda x: torch.cdist(x, x), (3,)),
        (lambda x: x.chunk(2), ()),
        (lambda x: fft.fft(x), ()),
        (lambda x: fft.fft2(x), (4,)),
    ],
    ids=["conv2d", "group_norm", "pad", "cdist", "chunk", "fft", "fft2"],
)
def test_a_batch_dim_does_not_stand_in_for_a_missing_one(f, shape):
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        f(torch.ones(shape))
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        lamina.vmap(f)(torch.ones(3, *shape))


def test_singular_matrices_are_named():
    matrices = torch.eye(2).repeat(3, 1, 1)
    matrices[1] = 0
    for f in (torch.linalg.inv, torch.linalg.cholesky):
        with pytest.raises(RuntimeError, match=f.__name__.removeprefix("linalg_")):
            lamina.vmap(f)(matrices)


def test_writes_through_chunks_and_unflattened_views():
    def f(x):
        x = x.clone()
        x.chunk(2)[1].mul_(10)
        x.unflatten(0, (2, 2))[0, 1].add_(1)
        return x

    agree(f, [torch.randn(3, 4, 5)], (0,))


@pytest.mark.parametrize(
    "loss",
    [
        F.soft_margin_loss,
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.binary_cross_entropy_with_logits,
        lambda x, y: F.kl_div(x, y, reduction="sum"),
    ],
)
def test_gradients_of_losses_of_numbers(loss):
    x, y = torch.tensor([0.3, -1.2, 0.7]), torch.tensor([1.0, 0.5, 1.0])
    want = torch.stack([lamina.grad(loss)(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(lamina.vmap(lamina.grad(loss))(x, y), want)
    torch.testing.assert_close(
        lamina.vmap(lamina.grad(loss), (0, None))(x, y[0]),
        lamina.vmap(lamina.grad(loss))(x, y[:1].expand(3)),
    )
