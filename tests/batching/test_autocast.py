"""`torch.autocast` under the transforms gives the dtypes that it gives in plain PyTorch.

The oracles are loops of plain PyTorch and `torch.autograd` in the same autocast block.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.amp import custom_bwd, custom_fwd
from torch.nn import functional as F

from lamina import grad, hessian, jvp, linear_transpose, linearize, vjp, vmap

BATCH = 3
LABELS = torch.tensor([0, 1, 2, 3])

# Functions of examples of the given shapes. A matmul in front gives an op a low-precision operand.
CASES = {
    "addmm": (torch.addmm, [(4, 2), (4, 3), (3, 2)]),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), [(1, 2, 4, 4, 4)]),
    "batch_norm": (lambda x: F.batch_norm(x, None, None, training=True), [(4, 3, 5)]),
    "bce_with_logits": (
        lambda x, y: F.binary_cross_entropy_with_logits(x @ x.T, (y @ y.T).sigmoid()),
        [(4, 3), (4, 3)],
    ),
    "bmm": (torch.bmm, [(2, 4, 3), (2, 3, 2)]),
    "cat of two dtypes": (lambda x, y: torch.cat([x @ x.T, y]), [(4, 3), (2, 4)]),
    "conv1d": (F.conv1d, [(2, 3, 7), (4, 3, 3)]),
    "conv2d": (F.conv2d, [(2, 3, 7, 6), (4, 3, 3, 2)]),
    "conv_transpose2d": (F.conv_transpose2d, [(2, 3, 7, 6), (3, 4, 3, 2)]),
    "cosine_similarity": (F.cosine_similarity, [(4, 3), (4, 3)]),
    "cross_entropy": (lambda x: F.cross_entropy(x @ x.T, LABELS), [(4, 3)]),
    "cumsum": (lambda x: (x @ x.T).cumsum(0), [(4, 3)]),
    "einsum": (lambda x, y: torch.einsum("ij,jk->ik", x, y), [(4, 3), (3, 2)]),
    "fft": (lambda x: torch.fft.rfft(x @ x.T).abs(), [(4, 3)]),
    "gelu": (lambda x: F.gelu(x @ x.T), [(4, 3)]),
    "group_norm": (lambda x: F.group_norm(x, 2), [(2, 4, 5)]),
    "inverse": (lambda x: torch.linalg.inv(x @ x.T + 9 * torch.eye(4)), [(4, 3)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), [(4, 3), (3,), (3,)]),
    "linear": (F.linear, [(4, 3), (5, 3), (5,)]),
    "log_softmax": (lambda x: F.log_softmax(x @ x.T, -1), [(4, 3)]),
    "matmul": (torch.matmul, [(4, 3), (3, 2)]),
    "mse_loss": (lambda x, y: F.mse_loss(x @ x.T, y @ y.T), [(4, 3), (4, 3)]),
    "prod": (lambda x: (x @ x.T).prod(), [(4, 3)]),
    "scaled_dot_product_attention": (
        F.scaled_dot_product_attention,
        [(2, 4, 3), (2, 5, 3), (2, 5, 3)],
    ),
    "smooth_l1_loss": (lambda x, y: F.smooth_l1_loss(x @ x.T, y @ y.T), [(4, 3), (4, 3)]),
    "softmax": (lambda x: F.softmax(x @ x.T, -1), [(4, 3)]),
    "sum of two dtypes": (lambda x: F.relu(x @ x.T) + x.sum(), [(4, 3)]),
    "tensordot": (lambda x, y: torch.tensordot(x, y, 1), [(4, 3), (3, 2)]),
}


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def inside(f):
    """`f`, which enters autocast by itself."""

    def run(*args):
        with autocast():
            return f(*args)

    return run


def same(call):
    return call


PLACES = {"inside": (inside, same), "outside": (same, inside)}


@pytest.fixture(params=PLACES)
def place(request):
    """Two decorators: one for the function, one for the call of its transform."""
    return PLACES[request.param]


def tensors(shapes, *batch):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*batch, *shape, generator=generator) for shape in shapes]


def close(actual, expected):
    """Equal dtypes, and values to within the rounding of bfloat16."""
    assert actual.dtype == expected.dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.03 * scale)


def total(f):
    return lambda *args: f(*args).float().square().sum()


def by_autograd(f, xs):
    leaves = [x.clone().requires_grad_() for x in xs]
    with autocast():
        out = total(f)(*leaves)
    return torch.autograd.grad(out, leaves)


@pytest.mark.parametrize("name", CASES)
def test_vmap(name, place):
    f, shapes = CASES[name]
    within, around = place
    xs = tensors(shapes, BATCH)
    expected = torch.stack([inside(f)(*examples) for examples in zip(*xs, strict=True)])
    close(around(vmap(within(f)))(*xs), expected)


@pytest.mark.parametrize("name", CASES)
def test_grad_and_vjp(name, place):
    f, shapes = CASES[name]
    within, around = place
    xs = tensors(shapes)
    positions = tuple(range(len(xs)))
    for actual, expected in zip(
        around(grad(total(within(f)), positions))(*xs), by_autograd(f, xs), strict=True
    ):
        close(actual, expected)
    out, pullback = around(lambda *xs: vjp(within(f), *xs))(*xs)
    assert out.dtype == inside(f)(*xs).dtype
    assert [ct.dtype for ct in pullback(torch.ones_like(out))] == [x.dtype for x in xs]


@pytest.mark.parametrize("name", CASES)
def test_jvp(name, place):
    f, shapes = CASES[name]
    within, around = place
    xs = tensors(shapes)
    tangents = tuple(x.cos() for x in xs)
    out, out_t = around(lambda: jvp(within(f), tuple(xs), tangents))()
    expected = inside(f)(*xs)
    close(out, expected)
    assert out_t.dtype == expected.dtype
    exact = jvp(f, tuple(x.double() for x in xs), tuple(t.double() for t in tangents))[1]
    scale = exact.abs().max().item()
    torch.testing.assert_close(out_t.double(), exact, rtol=0.05, atol=0.05 * scale)


@pytest.mark.parametrize("name", CASES)
def test_per_sample_gradients(name, place):
    f, shapes = CASES[name]
    within, around = place
    xs = tensors(shapes, BATCH)
    found = around(vmap(grad(total(within(f)), tuple(range(len(xs))))))(*xs)
    rows = [by_autograd(f, examples) for examples in zip(*xs, strict=True)]
    for actual, expected in zip(found, map(torch.stack, zip(*rows, strict=True)), strict=True):
        close(actual, expected)


# -- parameters that the function closes over ------------------------------------------------------


def test_backward_reaches_the_weights_of_a_mapped_model(place):
    within, around = place
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    params = list(model.parameters())
    expected = by_autograd_of(params, inside(model), x)
    found = by_autograd_of(params, around(vmap(within(model))), x)
    for actual, wanted in zip(found, expected, strict=True):
        close(actual, wanted)


def by_autograd_of(params, f, x):
    return torch.autograd.grad(f(x).float().square().sum(), params)


def test_autocast_keeps_no_weight_of_a_transform():
    """PyTorch keeps casted weights until the block ends; those of a transform would outlive it."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    x = torch.randn(5, 3)
    with autocast():
        outs = [model(x), vmap(model)(x), vmap(vmap(model))(x[None])[0], vmap(model)(x), model(x)]
        grads = [grad(lambda row: model(row).float().sum())(x[0]) for _ in range(2)]
        cached = torch.is_autocast_cache_enabled()
    assert cached
    for out in outs:
        close(out, outs[0])
        close(torch.autograd.grad(out.float().sum(), model.weight)[0], x.sum(0).expand(4, 3))
    close(grads[0], grads[1])


def test_backward_reaches_a_weight_inside_an_einsum(place):
    within, around = place
    torch.manual_seed(0)
    weight = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(5, 3)

    def f(x):
        return torch.einsum("j,ij->i", x, weight)

    expected = by_autograd_of([weight], lambda x: torch.stack([inside(f)(row) for row in x]), x)
    found = by_autograd_of([weight], around(vmap(within(f))), x)
    close(found[0], expected[0])
    assert around(vmap(within(f)))(x).dtype == torch.bfloat16


# -- layers, and functions with rules of their own -------------------------------------------------


@pytest.mark.parametrize("layer", [nn.GRU, nn.RNN])
def test_recurrent_layers(layer, place):
    within, around = place
    torch.manual_seed(0)
    module = layer(3, 4).requires_grad_(False)
    x = torch.randn(BATCH, 6, 2, 3)

    def f(x):
        return module(x)[0]

    close(around(vmap(within(f)))(x), torch.stack([inside(f)(example) for example in x]))
    rows = torch.stack([by_autograd(f, [example])[0] for example in x])
    close(around(vmap(grad(total(within(f)))))(x), rows)


@pytest.fixture
def without_fused_kernels_that_fail():
    """Where the processor has no bfloat16, PyTorch calls a fused LSTM that fails."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(before and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    yield
    torch._C._set_mkldnn_enabled(before)


@pytest.mark.usefixtures("without_fused_kernels_that_fail")
def test_an_lstm(place):
    within, around = place
    torch.manual_seed(0)
    module = nn.LSTM(3, 4).requires_grad_(False)
    x = torch.randn(BATCH, 6, 2, 3)

    def f(x):
        return module(x)[0]

    close(around(vmap(within(f)))(x), torch.stack([inside(f)(example) for example in x]))
    close(around(grad(total(within(f))))(x[0]), by_autograd(f, [x[0]])[0])


def test_an_encoder_layer(place):
    within, around = place
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    module.requires_grad_(False)
    x = torch.randn(BATCH, 2, 5, 4)
    close(around(vmap(within(module)))(x), torch.stack([inside(module)(example) for example in x]))


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, ct):
        x, w = ctx.saved_tensors
        return ct.float() @ w.T, x.T @ ct.float()


class CastProduct(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, ct):
        x, w = ctx.saved_tensors
        return ct @ w.T, x.T @ ct


@pytest.mark.parametrize("function", [Product, CastProduct])
def test_a_user_function(function, place):
    within, around = place
    x, w = tensors([(4, 3), (3, 2)], BATCH)
    f = function.apply
    expected = torch.stack([inside(f)(*pair) for pair in zip(x, w, strict=True)])
    close(around(vmap(within(f)))(x, w), expected)
    for actual, wanted in zip(
        around(grad(total(within(f)), (0, 1)))(x[0], w[0]),
        by_autograd(f, [x[0], w[0]]),
        strict=True,
    ):
        close(actual, wanted)


def test_autocast_may_be_switched_off_inside():
    x = torch.randn(BATCH, 4, 3)

    def f(x):
        low = x @ x.T
        with torch.autocast("cpu", enabled=False):
            return low, x @ x.T

    with autocast():
        low, high = vmap(f)(x)
    assert (low.dtype, high.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(high, x @ x.mT)


def test_autocast_leaves_the_ops_of_rules_alone():
    """They have the dtypes of the op they belong to, wherever a pass or a program is run."""
    x = torch.randn(4, 4) + 4 * torch.eye(4)
    t = torch.randn(4, 4)
    f = lambda x: torch.linalg.inv(x).square().sum()  # autocast has it computed in float32
    _, vjp_fn = vjp(torch.linalg.inv, x)
    _, jvp_fn = linearize(torch.linalg.inv, x)
    transposed = linear_transpose(lambda t: torch.linalg.inv(x) @ t, t)
    runs = {
        "grad": lambda: grad(f)(x),
        "vjp": lambda: vjp_fn(t)[0],
        "jvp": lambda: jvp(f, (x,), (t,))[1],
        "hessian": lambda: hessian(f)(x),
        "linearize": lambda: jvp_fn(t),
        "linear_transpose": lambda: transposed(t)[0],
    }
    for name, run in runs.items():
        torch.testing.assert_close(inside(run)(), run(), msg=name)
