"""Batching rules of matrix products, convolutions, norms, attention and recurrent layers.

Operator samples cover the plain cases; these are the traps: which operands are batched, where the
batch dim is, statistics that are written, masks, weights of their own per example.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lamina
from lamina_core.errors import MutationError

B = 3


@pytest.fixture(autouse=True)
def _no_loops(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "error")
    monkeypatch.setattr(lamina.config, "debug", 1)


def agree(f, args, in_dims, tolerance=1e-9):
    """`vmap(f)` gives the stacked results of the loop, in values, shapes and dtypes."""
    rows = []
    for i in range(B):
        row = [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
        out = f(*row)
        rows.append(out if isinstance(out, tuple) else (out,))
    expected = [torch.stack(column) for column in zip(*rows, strict=True)]
    actual = lamina.vmap(f, in_dims)(*args)
    actual = actual if isinstance(actual, tuple) else (actual,)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def batches(*shapes, where=0):
    """For each shape a batch of random tensors; the choices of who is batched; at least one is."""
    torch.manual_seed(0)
    for chosen in itertools.product([True, False], repeat=len(shapes)):
        if not any(chosen):
            continue
        args, in_dims = [], []
        for shape, batched in zip(shapes, chosen, strict=True):
            dim = min(where, len(shape))
            size = (*shape[:dim], B, *shape[dim:]) if batched else shape
            args.append(torch.randn(size, dtype=torch.float64))
            in_dims.append(dim if batched else None)
        yield args, tuple(in_dims)


WHERE = pytest.mark.parametrize("where", [0, 1, 9], ids=["first", "second", "last"])


@WHERE
@pytest.mark.parametrize(
    ("x", "y"),
    [
        ((4,), (4,)),
        ((4,), (4, 5)),
        ((2, 4), (4,)),
        ((2, 4), (4, 5)),
        ((2, 4), (4, 17)),
        ((4,), (4, 17)),
        ((6, 2, 4), (4, 5)),
        ((2, 4), (6, 4, 5)),
        ((6, 2, 4), (6, 4, 5)),
        ((6, 2, 4), (7, 1, 4, 5)),
        ((4,), (6, 4, 5)),
        ((6, 2, 4), (4,)),
        ((0, 4), (4, 5)),
        ((2, 0), (0, 5)),
    ],
)
def test_matmul(x, y, where):
    for args, in_dims in batches(x, y, where=where):
        agree(torch.matmul, args, in_dims)


@WHERE
@pytest.mark.parametrize("x", [(4,), (2, 4), (6, 2, 4)])
def test_linear(x, where):
    for args, in_dims in batches(x, (5, 4), (5,), where=where):
        agree(F.linear, args, in_dims)
    for args, in_dims in batches(x, (5, 4), where=where):
        agree(F.linear, args, in_dims)


@WHERE
@pytest.mark.parametrize("f", [torch.outer, torch.ger])
def test_outer(f, where):
    for args, in_dims in batches((4,), (5,), where=where):
        agree(f, args, in_dims)


@WHERE
@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("ij,jk->ik", [(2, 4), (4, 5)]),
        ("kj, ji", [(2, 4), (4, 5)]),
        ("Ba,aC", [(2, 4), (4, 5)]),
        ("ii", [(4, 4)]),
        ("ii->i", [(4, 4)]),
        ("ij->ji", [(2, 4)]),
        ("i,j->ij", [(2,), (4,)]),
        ("...i,...i->...", [(2, 3, 4), (3, 4)]),
        ("i...,j...", [(2, 3, 4), (5, 1, 4)]),
        ("aB,aC,a->BC", [(4, 2), (4, 3), (4,)]),
        (",i->i", [(), (4,)]),
    ],
)
def test_einsum(equation, shapes, where):
    for args, in_dims in batches(*shapes, where=where):
        agree(lambda *a: torch.einsum(equation, *a), args, in_dims)


def test_einsum_without_a_letter_to_spare():
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    x = torch.randn(B, *[1] * 26, dtype=torch.float64)
    equation = f"{letters[:26]},{letters[26:]}->aA"
    agree(lambda x: torch.einsum(equation, x, x), (x,), (0,))


@WHERE
@pytest.mark.parametrize("f", [torch.linalg.eigvalsh, torch.linalg.svdvals, torch.linalg.eigvals])
def test_eigenvalues(f, where):
    """Values, and gradients, which need the vectors, at a level above and at one below."""

    def total(x):
        return f(x + 2 * x.mT).abs().square().sum()

    for args, in_dims in batches((4, 4), where=where):
        agree(lambda x: f(x + 2 * x.mT), args, in_dims)
        agree(lambda x: lamina.grad(total)(x), args, in_dims)
        below = lamina.grad(lambda x, d=in_dims: lamina.vmap(total, d)(x).sum())(*args)
        above = lamina.vmap(lamina.grad(total), in_dims, in_dims[0])(*args)
        torch.testing.assert_close(below, above)


@pytest.mark.parametrize("beta", [0, 1, 2])
def test_sums_with_products(beta):
    options = {"beta": beta, "alpha": 3}
    for args, in_dims in batches((5,), (2, 4), (4, 5)):
        agree(lambda *a: torch.addmm(*a, **options), args, in_dims)
    for args, in_dims in batches((6, 2, 5), (6, 2, 4), (6, 4, 5)):
        agree(lambda *a: torch.baddbmm(*a, **options), args, in_dims)
    for args, in_dims in batches((2, 5), (6, 2, 4), (6, 4, 5)):
        agree(lambda *a: torch.addbmm(*a, **options), args, in_dims)


def test_addmm_with_beta_0_ignores_nan():
    x = torch.full((B, 5), torch.nan)
    y, z = torch.randn(B, 2, 4), torch.randn(4, 5)
    out = lamina.vmap(lambda x, y: torch.addmm(x, y, z, beta=0))(x, y)
    torch.testing.assert_close(out, y @ z)


def test_products_of_lazy_conjugates():
    x, y = torch.randn(2, B, 4, dtype=torch.complex128)
    agree(torch.vdot, (x, y[0]), (0, None))
    agree(lambda x: torch.dot(x, y[0].conj()), (x,), (0,))


@WHERE
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_conv(transposed, groups, where):
    op = F.conv_transpose2d if transposed else F.conv2d
    weight = (4, 6 // groups, 2, 3) if transposed else (6, 4 // groups, 2, 3)
    for args, in_dims in batches((2, 4, 5, 6), weight, (6,), where=where):
        agree(lambda *a: op(*a, stride=2, padding=1, groups=groups), args, in_dims)


def test_conv_with_one_setting_for_all_dims():
    for args, in_dims in batches((2, 4, 5, 6), (6, 4, 2, 3), (6,)):
        agree(
            lambda *a: torch.ops.aten.convolution(*a, [2], [1], [1], False, [0], 1), args, in_dims
        )


@pytest.mark.parametrize("mask", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_conv_backward(transposed, groups, mask):
    weight = (4, 6 // groups, 3) if transposed else (6, 4 // groups, 3)
    out = (2, 6, 7) if transposed else (2, 6, 3)

    def backward(*operands):
        cts = torch.ops.aten.convolution_backward(
            *operands, [6], [1], [0], [1], transposed, [0], groups, mask
        )
        return tuple(ct for ct in cts if ct is not None)

    for args, in_dims in batches(out, (2, 4, 5), weight):
        if in_dims[0] is None and mask[2]:
            continue  # the bias has one cotangent for all examples, which does not stack
        agree(backward, args, in_dims)


@WHERE
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training, where):
    def normalise(x, weight, bias, mean, var):
        mean, var = mean.clone(), var.abs()
        out = F.batch_norm(x, mean, var, weight, bias, training)
        return out, mean, var

    for args, in_dims in batches((4, 5, 2), (5,), (5,), (5,), (5,), where=where):
        agree(normalise, args, in_dims)


def test_batch_norm_writes_the_statistics_of_each_model():
    x = torch.randn(B, 4, 5, dtype=torch.float64)
    mean, var = torch.zeros(B, 5, dtype=torch.float64), torch.ones(B, 5, dtype=torch.float64)
    lamina.vmap(lambda x, m, v: F.batch_norm(x, m, v, training=True))(x, mean, var)
    torch.testing.assert_close(mean, 0.1 * x.mean(1))
    torch.testing.assert_close(var, 0.9 + 0.1 * x.var(1))


def test_batch_norm_will_not_write_many_statistics_to_one():
    x, mean, var = torch.randn(B, 4, 5), torch.zeros(5), torch.ones(5)
    with pytest.raises(MutationError, match="captured from outside"):
        lamina.vmap(lambda x: F.batch_norm(x, mean, var, training=True))(x)


@WHERE
def test_layer_and_group_norm(where):
    for args, in_dims in batches((2, 4, 6), (4, 6), (4, 6), where=where):
        agree(lambda x, w, b: F.layer_norm(x, (4, 6), w, b), args, in_dims)
    for args, in_dims in batches((2, 4, 6), (6,), where=where):
        agree(lambda x, w: F.rms_norm(x, (6,), w), args, in_dims)
    for args, in_dims in batches((2, 4, 6), (4,), (4,), where=where):
        agree(lambda x, w, b: F.group_norm(x, 2, w, b), args, in_dims)


@pytest.mark.parametrize("lead", [(), (5,), (2, 5), (2, 1, 5)])
@pytest.mark.parametrize("mask", [None, (4, 6), "full"])
@pytest.mark.parametrize("where", [0, 9])
def test_attention(lead, mask, where):
    shapes = [(*lead, 4, 8), (*lead, 6, 8), (*lead, 6, 7)]
    if mask is not None:
        shapes.append((*lead, 4, 6) if mask == "full" else mask)
    for args, in_dims in batches(*shapes, where=where):
        agree(F.scaled_dot_product_attention, args, in_dims)


def test_causal_attention_with_grouped_queries():
    for args, in_dims in batches((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)):
        agree(
            lambda *a: F.scaled_dot_product_attention(*a, is_causal=True, enable_gqa=True),
            args,
            in_dims,
        )


def test_attention_with_dropout_draws_as_asked():
    x = torch.randn(5, 8).expand(B, 5, 8)

    def attend(x):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    same = lamina.vmap(attend, randomness="same")(x)
    different = lamina.vmap(attend, randomness="different")(x)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batched", ["input", "weights", "both"])
def test_recurrent_layers(kind, batched):
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dtype": torch.float64}
    if kind is nn.LSTM:
        options["proj_size"] = 2
    layers = [kind(4, 3, **options) for _ in range(B)]
    names = [name for name, _ in layers[0].named_parameters()]
    weights = [
        torch.stack([layer.get_parameter(name).detach() for layer in layers]) for name in names
    ]
    x = torch.randn(B, 2, 6, 4, dtype=torch.float64)

    def run(x, *weights):
        out, state = lamina.functional_call(layers[0], dict(zip(names, weights, strict=True)), (x,))
        return out, *(state if isinstance(state, tuple) else (state,))

    if batched == "input":
        weights = [w[0] for w in weights]
    x = x[0] if batched == "weights" else x
    in_dims = (
        None if batched == "weights" else 0,
        *[None if batched == "input" else 0] * len(names),
    )
    agree(run, (x, *weights), in_dims)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("first", [True, False])
def test_recurrent_states(kind, first):
    torch.manual_seed(0)
    layer = kind(4, 3, batch_first=first).double()

    def run(x, h):
        out, state = layer(x, (h, h.cos()) if kind is nn.LSTM else h)
        return out.detach(), *(s.detach() for s in (state if kind is nn.LSTM else (state,)))

    for where in (0, 1, 9):
        for args, in_dims in batches((2, 5, 4), (1, 2 if first else 5, 3), where=where):
            agree(run, args, in_dims)
        for args, in_dims in batches((5, 4), (1, 3), where=where):  # one sequence
            agree(run, args, in_dims)


def test_gradients_of_shared_recurrent_weights():
    """In both orders, and by `backward` into the weights that the function captured."""
    torch.manual_seed(0)
    layer = nn.LSTM(4, 3, num_layers=2).double()
    x = torch.randn(B, 5, 2, 4, dtype=torch.float64)
    names, leaves = zip(*layer.named_parameters(), strict=True)
    weights = {name: leaf.detach() for name, leaf in zip(names, leaves, strict=True)}

    def loss(weights, x):
        return lamina.functional_call(layer, weights, (x,))[0].sin().sum()

    total = sum(layer(row)[0].sin().sum() for row in x)
    expected = dict(zip(names, torch.autograd.grad(total, leaves), strict=True))
    each = lamina.vmap(lamina.grad(loss), (None, 0))(weights, x)
    whole = lamina.grad(lambda w: lamina.vmap(loss, (None, 0))(w, x).sum())(weights)
    lamina.vmap(lambda x: layer(x)[0].sin().sum())(x).sum().backward()
    for name, leaf in zip(names, leaves, strict=True):
        torch.testing.assert_close(each[name].sum(0), expected[name])
        torch.testing.assert_close(whole[name], expected[name])
        torch.testing.assert_close(leaf.grad, expected[name])


def test_dropout_between_recurrent_layers_draws_as_asked():
    layer = nn.LSTM(4, 3, num_layers=2, dropout=0.5).requires_grad_(False)
    x = torch.randn(5, 2, 4).expand(B, 5, 2, 4)
    same = lamina.vmap(lambda x: layer(x)[0], randomness="same")(x)
    different = lamina.vmap(lambda x: layer(x)[0], randomness="different")(x)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def test_embedding_of_tables_and_indices_with_padding():
    table = torch.randn(B, 7, 2, dtype=torch.float64)
    index = torch.randint(7, (B, 2, 5))
    ct = torch.randn(B, 2, 5, 2, dtype=torch.float64)

    def pulled_back(table, index, ct):
        out, pullback = lamina.vjp(lambda t: F.embedding(index, t, padding_idx=3), table)
        return out, *pullback(ct)

    for in_dims in itertools.product([0, None], repeat=3):
        if any(d is not None for d in in_dims):
            args = [a if d == 0 else a[0] for a, d in zip((table, index, ct), in_dims, strict=True)]
            agree(pulled_back, args, in_dims)


def test_nested_vmap_of_conv():
    x, weight = torch.randn(B, 2, 3, 5, 5), torch.randn(4, 6, 3, 2, 2)
    out = lamina.vmap(lambda x: lamina.vmap(lambda w: F.conv2d(x, w))(weight))(x)
    expected = torch.stack([torch.stack([F.conv2d(a, w) for w in weight]) for a in x])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_no_examples():
    def empty(*shape):
        return torch.zeros(0, *shape)

    image, kernel = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 2, 2)
    assert lamina.vmap(lambda x: F.conv2d(x, kernel))(empty(1, 2, 4, 4)).shape == (0, 1, 3, 3, 3)
    assert lamina.vmap(lambda w: F.conv2d(image, w))(empty(3, 2, 2, 2)).shape == (0, 1, 3, 3, 3)
    assert lamina.vmap(F.conv2d)(empty(1, 2, 4, 4), empty(3, 2, 2, 2)).shape == (0, 1, 3, 3, 3)
    assert lamina.vmap(lambda x: F.avg_pool2d(x, 2))(empty(1, 2, 4, 4)).shape == (0, 1, 2, 2, 2)
    assert lamina.vmap(lambda x: F.linear(x, torch.ones(5, 4)))(empty(2, 4)).shape == (0, 2, 5)
    assert lamina.vmap(lambda x: x.amax())(empty(2, 4)).shape == (0,)
