"""Derivatives of small transformers in double precision, against central differences.

Differences are taken of the plain functions, so what they say depends on no derivative formula.
Richardson's extrapolation of two step widths leaves an error of the fourth order in the step.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lamina import functional_call, grad, hessian, hvp, jacfwd, jacrev, jvp, vjp, vmap
from lamina_core import pytree

DOUBLE = torch.float64
BATCH, LENGTH, WIDTH, HEADS = 2, 4, 8, 2


class EncoderBlock(nn.Module):
    """Post-norm, with `nn.MultiheadAttention` and a mask of padding."""

    def __init__(self, need_weights=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.need_weights = need_weights

    def forward(self, x):
        """[B, L, W] -> [B, L, W]."""
        padded = torch.zeros(x.shape[:2], dtype=torch.bool)
        padded[1:, -1] = True
        found, weights = self.attention(
            x, x, x, key_padding_mask=padded, need_weights=self.need_weights
        )
        x = self.first(x + found)
        if weights is not None:
            x = x + (weights @ x).tanh()
        return self.second(x + self.down(F.gelu(self.up(x))))


class DecoderBlock(nn.Module):
    """Pre-norm, causal, with grouped queries and `scaled_dot_product_attention`."""

    def __init__(self, mask="causal", groups=1):
        super().__init__()
        self.mask, self.kv_heads = mask, HEADS // groups
        self.queries = nn.Linear(WIDTH, WIDTH, bias=False)
        self.keys = nn.Linear(WIDTH, self.kv_heads * WIDTH // HEADS, bias=False)
        self.values = nn.Linear(WIDTH, self.kv_heads * WIDTH // HEADS, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)

    def masks(self):
        """The arguments that say who attends to whom."""
        lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        return {
            "causal": {"is_causal": True},
            "bool": {"attn_mask": lower},
            "bias": {"attn_mask": torch.where(lower, -0.3 * distance.double(), -torch.inf)},
            "none": {},
        }[self.mask]

    def forward(self, x):
        """[B, L, W] -> [B, L, W]."""
        h = self.first(x)

        def in_heads(projected, heads):
            return projected.unflatten(-1, (heads, -1)).transpose(-3, -2)

        found = F.scaled_dot_product_attention(
            in_heads(self.queries(h), HEADS),
            in_heads(self.keys(h), self.kv_heads),
            in_heads(self.values(h), self.kv_heads),
            enable_gqa=self.kv_heads != HEADS,
            **self.masks(),
        )
        x = x + self.out(found.transpose(-3, -2).flatten(-2))
        h = self.second(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


BLOCKS = {
    "encoder": EncoderBlock,
    "encoder, weights": lambda: EncoderBlock(need_weights=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(
        WIDTH, HEADS, 12, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
    ),
    "causal": DecoderBlock,
    "causal, gqa": lambda: DecoderBlock(groups=2),
    "bool mask": lambda: DecoderBlock("bool"),
    "bias, gqa": lambda: DecoderBlock("bias", groups=2),
    "no mask": lambda: DecoderBlock("none"),
}
KERNELS = {"math": [SDPBackend.MATH], "default": None}


def network(block):
    """The block, its parameters, an input and a target, the same in every run."""
    torch.manual_seed(0)
    module = BLOCKS[block]().double()
    params = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in module.named_parameters()}
    return module, params, torch.randn(BATCH, LENGTH, WIDTH).double()


def directions(tree):
    torch.manual_seed(1)
    return pytree.tree_map(torch.randn_like, tree)


def along(tree, direction, step):
    return {name: x + step * direction[name] for name, x in tree.items()}


def richardson(f, step=2e-3):
    """df/dt at t = 0, with an error in the fourth power of the step."""

    def central(h):
        return (f(h) - f(-h)) / (2 * h)

    return (4 * central(step / 2) - central(step)) / 3


def near(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def loss_of(module, x):
    """A scalar of the output that no symmetry of a norm makes flat."""
    weights = torch.linspace(-1, 2, x.numel(), dtype=DOUBLE).reshape(x.shape).sin()

    def loss(params):
        return (functional_call(module, params, (x,)) * weights).tanh().sum()

    return loss


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request):
    """With the fused kernel of the machine, if it takes the call, and without."""
    chosen = KERNELS[request.param]
    if chosen is None:
        yield
        return
    with sdpa_kernel(chosen):
        yield


@pytest.mark.parametrize("block", BLOCKS)
def test_jvp_against_differences(block):
    module, params, x = network(block)
    inputs = {**params, "x": x}
    tangents = directions(inputs)

    def f(inputs):
        params = {name: p for name, p in inputs.items() if name != "x"}
        return functional_call(module, params, (inputs["x"],))

    out, out_t = jvp(f, (inputs,), (tangents,))
    near(out, f(inputs), 1e-12)
    near(out_t, richardson(lambda h: f(along(inputs, tangents, h))), 2e-7)
    ct = directions(out)
    (pulled,) = vjp(f, inputs)[1](ct)
    product = sum((pulled[name] * t).sum() for name, t in tangents.items())
    near(product, (ct * out_t).sum(), 1e-10)


@pytest.mark.parametrize("block", BLOCKS)
def test_hvp_against_differences(block):
    """Differences of the loss for the quadratic form, and of its gradient for the product."""
    module, params, x = network(block)
    loss, tangents = loss_of(module, x), directions(params)
    product = hvp(loss, (params,), (tangents,))[1][0]
    slope = jvp(grad(loss), (params,), (tangents,))[1]
    rowwise = grad(lambda p: jvp(loss, (p,), (tangents,))[1])(params)
    twice = grad(lambda p: sum((g * tangents[n]).sum() for n, g in grad(loss)(p).items()))(params)
    for name in params:
        for other in (slope, rowwise, twice):
            near(other[name], product[name], 1e-9)

    def second(h):
        steps = [loss(along(params, tangents, h * k)) for k in (-2, -1, 0, 1, 2)]
        return (-steps[0] + 16 * steps[1] - 30 * steps[2] + 16 * steps[3] - steps[4]) / (12 * h * h)

    form = sum((tangents[name] * h).sum() for name, h in product.items())
    near(form, second(4e-3), 2e-5)
    # Each entry, by differences of gradients that are held against plain differences themselves.
    gradient = grad(loss)(params)
    near(
        sum((gradient[name] * t).sum() for name, t in tangents.items()),
        richardson(lambda h: loss(along(params, tangents, h))),
        2e-7,
    )
    for name in params:
        expected = richardson(lambda h, name=name: grad(loss)(along(params, tangents, h))[name])
        near(product[name], expected, 2e-6)


@pytest.mark.parametrize("block", ["encoder", "causal, gqa", "bias, gqa"])
def test_hessian_against_differences(block):
    """In four directions of the input: no derivative of ours is on the other side."""
    module, params, x = network(block)
    base = directions({"x": x.expand(4, *x.shape)})["x"]

    def f(steps):
        moved = x + torch.tensordot(steps, base, 1)
        weights = torch.linspace(-1, 2, x.numel(), dtype=DOUBLE).reshape(x.shape).sin()
        return (functional_call(module, params, (moved,)) * weights).tanh().sum()

    zero = torch.zeros(4, dtype=DOUBLE)
    unit = torch.eye(4, dtype=DOUBLE)

    def entry(i, j):
        return richardson(lambda a: richardson(lambda b: f(a * unit[i] + b * unit[j]), 2e-2), 2e-2)

    expected = torch.stack([torch.stack([entry(i, j) for j in range(4)]) for i in range(4)])
    found = hessian(f)(zero)
    near(found, found.T, 1e-9)
    near(found, expected, 2e-4)
    for inner in (jacfwd, jacrev):
        for outer in (jacfwd, jacrev):
            near(outer(inner(f))(zero), found, 1e-9)


@pytest.mark.parametrize("block", ["encoder", "causal", "causal, gqa", "bias, gqa"])
def test_gradient_of_a_loss_with_a_jvp(block):
    """The loss of MeanFlow: the average velocity u satisfies u = v - (t - r) du/dt.

    Geng et al., "Mean flows for one-step generative modeling" (2025), equations 6 and 9, here with
    the target differentiated as well, which no stop of gradients hides.
    """
    module, params, noise = network(block)
    data = directions({"x": noise})["x"]
    v = noise - data
    r, t = torch.tensor(0.2, dtype=DOUBLE), torch.tensor(0.7, dtype=DOUBLE)
    z = (1 - t) * data + t * noise

    def u(params, z, r, t):
        return functional_call(module, params, (z * (1 + 0.3 * t) + 0.5 * torch.sin(t - r),))

    def loss(params):
        one, zero = torch.ones_like(t), torch.zeros_like(r)
        mean, du_dt = jvp(lambda z, r, t: u(params, z, r, t), (z, r, t), (v, zero, one))
        return (mean - (v - (t - r) * du_dt)).square().mean()

    def by_differences(params):
        du_dt = richardson(lambda h: u(params, z + h * v, r, t + h))
        return (u(params, z, r, t) - (v - (t - r) * du_dt)).square().mean()

    near(loss(params), by_differences(params), 1e-7)
    gradient = grad(loss)(params)
    tangents = directions(params)
    slope = sum((gradient[name] * p_t).sum() for name, p_t in tangents.items())
    near(slope, richardson(lambda h: loss(along(params, tangents, h))), 1e-6)
    near(slope, richardson(lambda h: by_differences(along(params, tangents, h))), 1e-6)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    found = torch.autograd.grad(by_differences(leaves), list(leaves.values()))
    for name, expected in zip(params, found, strict=True):
        near(gradient[name], expected, 1e-6)
    # The user's own autograd through our jvp, which is how such a loss is trained.
    found = torch.autograd.grad(loss(leaves), list(leaves.values()))
    for name, of_user in zip(params, found, strict=True):
        near(of_user, gradient[name], 1e-10)


@pytest.mark.parametrize("block", ["causal, gqa", "bool mask"])
def test_each_example_of_a_loss_with_a_jvp(block):
    module, params, x = network(block)
    v = directions({"x": x})["x"]

    def loss(params, x, v):
        out, out_t = jvp(lambda x: functional_call(module, params, (x[None],)), (x,), (v,))
        return (out + 0.5 * out_t).square().mean()

    found = vmap(grad(loss), (None, 0, 0))(params, x, v)
    for i in range(BATCH):
        expected = grad(loss)(params, x[i], v[i])
        tangents = directions(params)
        slope = sum((expected[name] * t).sum() for name, t in tangents.items())
        differences = richardson(lambda h, i=i, t=tangents: loss(along(params, t, h), x[i], v[i]))
        near(slope, differences, 1e-6)
        for name in params:
            near(found[name][i], expected[name], 1e-10)
