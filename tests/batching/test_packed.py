"""Packed sequences under the transforms, where all examples share the lengths.

The oracles are loops of plain PyTorch and `torch.autograd`.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lamina import functional_call, grad, jvp, vmap
from lamina_core.errors import DataDependentError
from tests.errors.saying import said

LAYERS = {
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(3, 4),
    "rnn_tanh": lambda: nn.RNN(3, 4),
    "rnn_relu": lambda: nn.RNN(3, 4, nonlinearity="relu"),
}
LENGTHS = torch.tensor([5, 3, 3, 1])


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=LAYERS)
def f(request):
    """[T, N, I] -> [T', N, H] through packing and padding; T' is the longest length."""
    torch.manual_seed(0)
    layer = LAYERS[request.param]().double()

    def run(x, params=None):
        packed = pack_padded_sequence(x, LENGTHS)
        called = (packed,)
        out = layer(packed) if params is None else functional_call(layer, params, called)
        return pad_packed_sequence(out[0], padding_value=-1.0)[0]

    run.params = {name: p.detach() for name, p in layer.named_parameters()}
    return run


def test_examples_that_share_their_lengths(f):
    x = rand(2, 6, 4, 3)
    expected = torch.stack([f(example) for example in x])
    assert expected.shape[:3] == (2, 5, 4)
    torch.testing.assert_close(vmap(f)(x), expected)
    torch.testing.assert_close(vmap(f, in_dims=3)(x.movedim(0, 3)), expected)
    torch.testing.assert_close(vmap(lambda x: f(x, f.params))(x), expected)


def test_derivatives(f):
    x, v = rand(6, 4, 3), rand(6, 4, 3).cos()

    def loss(x, params):
        return f(x, params).square().sum()

    leaves = [x.clone().requires_grad_(), *[p.clone() for p in f.params.values()]]
    for leaf in leaves[1:]:
        leaf.requires_grad_()
    params = dict(zip(f.params, leaves[1:], strict=True))
    expected = torch.autograd.grad(loss(leaves[0], params), leaves)
    x_ct, params_ct = grad(loss, (0, 1))(x, f.params)
    torch.testing.assert_close([x_ct, *params_ct.values()], list(expected))
    out_t = jvp(lambda x: loss(x, f.params), (x,), (v,))[1]
    torch.testing.assert_close(out_t, (expected[0] * v).sum())


def test_per_sample_gradients(f):
    x = rand(2, 6, 4, 3)

    def loss(x):
        return f(x, f.params).square().sum()

    found = vmap(grad(loss))(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sum(loss(example) for example in leaf), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("total_length", [None, 7])
def test_packing_and_padding(batch_first, total_length):
    x = rand(2, 4, 6, 3) if batch_first else rand(2, 6, 4, 3)

    def there_and_back(x):
        packed = pack_padded_sequence(x, LENGTHS, batch_first)
        back = pad_packed_sequence(packed, batch_first, 2.0, total_length)
        return packed.data, packed.batch_sizes, *back

    expected = [torch.stack(c) for c in zip(*map(there_and_back, x), strict=True)]
    torch.testing.assert_close(list(vmap(there_and_back)(x)), expected)


def test_sequences_that_are_not_sorted():
    x = rand(2, 6, 3, 1)

    def there_and_back(x):
        packed = pack_padded_sequence(x, torch.tensor([2, 6, 4]), enforce_sorted=False)
        return pad_packed_sequence(packed)[0]

    torch.testing.assert_close(vmap(there_and_back)(x), torch.stack([*map(there_and_back, x)]))


def test_lengths_of_each_example_are_an_error():
    x, lengths = rand(4, 2, 3), torch.tensor([[4, 2], [3, 3]])
    text = said(
        DataDependentError,
        lambda: vmap(lambda n: pack_padded_sequence(x, n).data, randomness="same")(lengths),
    )
    assert text.splitlines()[1:] == [
        "  while interpreting at level 1: vmap(batch_size=2, randomness='same')",
        "  lengths or batch sizes: a mapped tensor of shape [2]",
        "  to fix: pad the sequences to one length, and mask what follows the last step",
    ]


@pytest.mark.parametrize("lengths", [[2, 4], [4, 0], [4, 2, 1]])
def test_lengths_that_do_not_fit_are_an_error(lengths):
    def packed(x):
        return torch.ops.aten._pack_padded_sequence(x, torch.tensor(lengths), False)[0]

    with pytest.raises(RuntimeError) as own:  # PyTorch's
        packed(rand(6, 2, 3))
    with pytest.raises(RuntimeError, match=re.escape(str(own.value))):
        vmap(packed)(rand(5, 6, 2, 3))
