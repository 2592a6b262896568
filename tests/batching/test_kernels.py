"""Kernels of one device or backend: run as the op that stands for them on all.

Those that a CPU has are held to the loop over themselves. For the others the oracle is the loop
over the op that they compute, called in plain PyTorch with the arguments spelt out.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import lamina
from lamina.decompose.kernels import KERNELS
from tests.batching.test_matmul_conv_norm import WHERE, B, agree, batches

aten = torch.ops.aten

X, W, BIAS = (2, 4, 7, 6), (6, 4, 3, 2), (6,)
X3, W3 = (1, 4, 5, 6, 4), (6, 4, 3, 2, 2)
W_T = (4, 6, 3, 2)
POINTS = (2, 3, 5, 2)


@pytest.fixture(autouse=True)
def _no_loops(monkeypatch):
    monkeypatch.setattr(lamina.config, "fallback", "error")
    monkeypatch.setattr(lamina.config, "debug", 1)


def updated(x, mean, var):
    mean, var = mean.clone(), var.clone()
    return *aten.batch_norm_update_stats(x, mean, var, 0.3), mean, var


ON_CPU = {
    "_add_relu": (lambda x: aten._add_relu(x, -0.25, 2), (2, 3)),
    "_compute_linear_combination": (aten._compute_linear_combination, (3, 2, 4), (5, 3)),
    "_convolution": (
        lambda x, w, b: aten._convolution(
            x, w, b, [2], [1], [1], False, [0], 1, False, False, False, False
        ),
        X,
        W,
        BIAS,
    ),
    "_convolution, transposed": (
        lambda x, w: aten._convolution(
            x, w, None, [2, 1], [1, 1], [1, 1], True, [1, 0], 2, False, False, False, False
        ),
        X,
        (4, 3, 3, 2),
    ),
    "_lazy_clone": (aten._lazy_clone, (2, 3)),
    "_slow_conv2d_backward": (
        # Of an x with strides of its own the kernel gives a wrong gradient of the weight.
        lambda ct, x, w: aten._slow_conv2d_backward(
            ct, x.contiguous(), w, [3, 2], [1, 2], [1, 0], [True, True, True]
        ),
        (2, 6, 7, 3),
        X,
        W,
    ),
    "_slow_conv2d_forward": (
        lambda x, w, b: aten._slow_conv2d_forward(x, w, [3, 2], b, [2, 1], [1, 0]),
        X,
        W,
        BIAS,
    ),
    "_transform_bias_rescale_qkv": (
        lambda qkv, b: tuple(aten._transform_bias_rescale_qkv(qkv, b, 4)),
        (2, 5, 24),
        (24,),
    ),
    "batch_norm_update_stats": (updated, (2, 4, 3), (4,), (4,)),
    "slow_conv3d_forward": (
        lambda x, w, b: aten.slow_conv3d_forward(x, w, [3, 2, 2], b, [1, 2, 1], [1, 0, 1]),
        X3,
        W3,
        BIAS,
    ),
    "slow_conv_dilated2d": (
        lambda x, w, b: aten.slow_conv_dilated2d(x, w, [3, 2], b, [1, 1], [1, 0], [2, 3]),
        X,
        W,
        BIAS,
    ),
    "slow_conv_dilated2d of one image": (
        lambda x, w: aten.slow_conv_dilated2d(x, w, [3, 2]),
        X[1:],
        W,
    ),
    "slow_conv_dilated3d": (
        lambda x, w: aten.slow_conv_dilated3d(x, w, [3, 2, 2], dilation=[2, 1, 1]),
        X3,
        W3,
    ),
    "slow_conv_transpose2d": (
        lambda x, w, b: aten.slow_conv_transpose2d(x, w, [3, 2], b, [2, 2], [1, 0], [1, 0]),
        X,
        W_T,
        BIAS,
    ),
    "slow_conv_transpose3d": (
        lambda x, w: aten.slow_conv_transpose3d(x, w, [3, 2, 2], None, [2, 1, 1]),
        X3,
        (4, 6, 3, 2, 2),
    ),
    "slow_conv_transpose3d of one image": (
        lambda x, w, b: aten.slow_conv_transpose3d(x, w, [3, 2, 2], b, [2, 1, 1]),
        X3[1:],
        (4, 6, 3, 2, 2),
        BIAS,
    ),
}


@WHERE
@pytest.mark.parametrize("name", ON_CPU)
def test_kernels_of_a_cpu(name, where):
    f, *shapes = ON_CPU[name]
    for args, in_dims in batches(*shapes, where=where):
        agree(f, args, in_dims)


SINGLE = {
    "_grid_sampler_2d_cpu_fallback": (
        lambda x, points: aten._grid_sampler_2d_cpu_fallback(x, 1.3 * points.sin(), 0, 1, False),
        X,
        POINTS,
    ),
    "_grid_sampler_2d_cpu_fallback_backward": (
        lambda ct, x, points: aten._grid_sampler_2d_cpu_fallback_backward(
            ct, x, 1.3 * points.sin(), 0, 0, True
        ),
        (2, 4, 3, 5),
        X,
        POINTS,
    ),
    "mkldnn_convolution": (
        lambda x, w, b: aten.mkldnn_convolution(x, w, b, [1, 0], [2, 1], [1, 1], 1),
        X,
        W,
        BIAS,
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_kernels_of_a_cpu_in_single_precision(name):
    f, *shapes = SINGLE[name]
    for args, in_dims in batches(*shapes):
        agree(f, [a.float() for a in args], in_dims, 1e-4)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_lists_of_quantised_tensors():
    x = torch.linspace(-1, 1, 12).reshape(3, 4)

    def f(x):
        whole = torch.quantize_per_tensor(x, 0.1, 3, torch.qint8)
        return tuple(torch.dequantize([whole, whole]))

    agree(f, [x], (0,), 0)


def conv(x, w, b=None, stride=1, padding=0, dilation=1, groups=1):
    return F.conv2d(x, w, b, stride, padding, dilation, groups)


def batch_norm(x, w, b, mean, var, training):
    mean, var = mean.clone(), var.exp()
    outs = aten.native_batch_norm(x, w, b, mean, var, training, 0.1, 1e-5)
    return *outs, mean, var


def by_kernel(kernel):
    """Batch norm by a kernel with outputs of its own behind the first three."""

    def f(x, w, b, mean, var, training):
        mean, var = mean.clone(), var.exp()
        outs = kernel(x, w, b, mean, var, training, 0.1, 1e-5)
        return *outs[:3], mean, var

    return f


def conv_backward(ct, x, w, transposed=False, mask=(True, True, True)):
    op = F.conv_transpose2d if transposed else F.conv2d
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    found = torch.autograd.grad(op(*leaves, stride=(1, 2), padding=(1, 0)), leaves, ct)
    return (*found, ct.sum((0, 2, 3)))[: len(mask)]


FLAGS = (False, False, False)
SPREAD = ([2, 1], [1, 0], [1, 2])  # stride, padding, dilation
GRID = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": True}


def grid_backward(x, points, ct):
    leaves = [x.clone().requires_grad_(), points.clone().requires_grad_()]
    return torch.autograd.grad(F.grid_sample(*leaves, **GRID), leaves, ct)


def affine_backward(ct):
    theta = torch.zeros(2, 2, 3, dtype=ct.dtype, requires_grad=True)
    return torch.autograd.grad(F.affine_grid(theta, [2, 1, 3, 4], True), theta, ct)[0]


# What is called, what it computes, and the shapes of the operands.
ELSEWHERE = {
    "_conv_depthwise2d": (
        lambda x, w, b: aten._conv_depthwise2d(x, w, [3, 2], b, *SPREAD),
        lambda x, w, b: conv(x, w, b, *SPREAD, groups=4),
        X,
        (8, 1, 3, 2),
        (8,),
    ),
    "_masked_scale": (
        lambda x, mask: aten._masked_scale(x, mask > 0, 2.0),
        lambda x, mask: torch.where(mask > 0, x * 2, 0.0),
        (2, 3),
        (2, 3),
    ),
    "_mps_convolution": (
        lambda x, w, b: aten._mps_convolution(x, w, b, [1, 0], [2, 1], [1, 2], 1),
        lambda x, w, b: conv(x, w, b, *SPREAD),
        X,
        W,
        BIAS,
    ),
    "_mps_convolution_transpose": (
        lambda x, w: aten._mps_convolution_transpose(x, w, [1, 0], [1, 0], [2, 1], [1, 1], 1),
        lambda x, w: F.conv_transpose2d(x, w, None, (2, 1), (1, 0), (1, 0)),
        X,
        W_T,
    ),
    "_nnpack_spatial_convolution": (
        # It takes single precision alone.
        lambda x, w, b: aten._nnpack_spatial_convolution(x.float(), w.float(), b.float(), [1, 0]),
        lambda x, w, b: conv(x.float(), w.float(), b.float(), 1, (1, 0)),
        X,
        W,
        BIAS,
    ),
    "conv_depthwise3d": (
        lambda x, w: aten.conv_depthwise3d(x, w, [3, 2, 2], None, [1] * 3, [1, 0, 1], [1] * 3),
        lambda x, w: F.conv3d(x, w, padding=(1, 0, 1), groups=4),
        X3,
        (4, 1, 3, 2, 2),
    ),
    "convolution_backward_overrideable": (
        lambda ct, x, w: aten.convolution_backward_overrideable(
            ct, x, w, [1, 2], [1, 0], [1, 1], False, [0, 0], 1, [True, True, True]
        ),
        conv_backward,
        (2, 6, 7, 3),
        X,
        W,
    ),
    "convolution_overrideable": (
        lambda x, w, b: aten.convolution_overrideable(x, w, b, *SPREAD, False, [0, 0], 1),
        lambda x, w, b: conv(x, w, b, *SPREAD),
        X,
        W,
        BIAS,
    ),
    "cudnn_affine_grid_generator": (
        lambda theta: aten.cudnn_affine_grid_generator(theta, 2, 1, 3, 4),
        lambda theta: F.affine_grid(theta, [2, 1, 3, 4], True),
        (2, 2, 3),
    ),
    "cudnn_affine_grid_generator_backward": (
        lambda ct: aten.cudnn_affine_grid_generator_backward(ct, 2, 1, 3, 4),
        affine_backward,
        (2, 3, 4, 2),
    ),
    "cudnn_batch_norm": (
        lambda *args: by_kernel(aten.cudnn_batch_norm)(*args, True),
        lambda *args: batch_norm(*args, True),
        (3, 4, 2),
        *[(4,)] * 4,
    ),
    "cudnn_convolution": (
        lambda x, w: aten.cudnn_convolution(x, w, [1, 0], [2, 1], [1, 2], 2, *FLAGS),
        lambda x, w: conv(x, w, None, *SPREAD, groups=2),
        X,
        (6, 2, 3, 2),
    ),
    "cudnn_convolution_add_relu": (
        lambda x, w, z, b: aten.cudnn_convolution_add_relu(x, w, z, 0.5, b, *SPREAD, 1),
        lambda x, w, z, b: (conv(x, w, b, *SPREAD) + 0.5 * z).relu(),
        X,
        W,
        (2, 6, 4, 4),
        BIAS,
    ),
    "cudnn_convolution_relu": (
        lambda x, w: aten.cudnn_convolution_relu(x, w, None, *SPREAD, 1),
        lambda x, w: conv(x, w, None, *SPREAD).relu(),
        X,
        W,
    ),
    "cudnn_convolution_transpose": (
        lambda x, w: aten.cudnn_convolution_transpose(
            x, w, [1, 0], [1, 0], [2, 1], [1, 1], 1, *FLAGS
        ),
        lambda x, w: F.conv_transpose2d(x, w, None, (2, 1), (1, 0), (1, 0)),
        X,
        W_T,
    ),
    "cudnn_grid_sampler": (
        lambda x, points: aten.cudnn_grid_sampler(x, 1.3 * points.sin()),
        lambda x, points: F.grid_sample(x, 1.3 * points.sin(), **GRID),
        X,
        POINTS,
    ),
    "cudnn_grid_sampler_backward": (
        lambda x, points, ct: aten.cudnn_grid_sampler_backward(x, points.sin(), ct),
        lambda x, points, ct: grid_backward(x, points.sin(), ct),
        X,
        POINTS,
        (2, 4, 3, 5),
    ),
    "miopen_batch_norm": (
        lambda *args: by_kernel(aten.miopen_batch_norm)(*args, False),
        lambda *args: batch_norm(*args, False),
        (3, 4, 2),
        *[(4,)] * 4,
    ),
    "miopen_convolution": (
        lambda x, w, b: aten.miopen_convolution(x, w, b, [1, 0], [2, 1], [1, 2], 1, False, False),
        lambda x, w, b: conv(x, w, b, *SPREAD),
        X,
        W,
        BIAS,
    ),
    "miopen_convolution_add_relu": (
        lambda x, w, z: aten.miopen_convolution_add_relu(x, w, z, None, None, *SPREAD, 1),
        lambda x, w, z: (conv(x, w, None, *SPREAD) + z).relu(),
        X,
        W,
        (2, 6, 4, 4),
    ),
    "miopen_convolution_relu": (
        lambda x, w, b: aten.miopen_convolution_relu(x, w, b, *SPREAD, 1),
        lambda x, w, b: conv(x, w, b, *SPREAD).relu(),
        X,
        W,
        BIAS,
    ),
    "miopen_convolution_transpose": (
        lambda x, w, b: aten.miopen_convolution_transpose(
            x, w, b, [1, 0], [1, 0], [2, 1], [1, 1], 1, False, False
        ),
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 1), (1, 0), (1, 0)),
        X,
        W_T,
        BIAS,
    ),
    "miopen_depthwise_convolution": (
        lambda x, w: aten.miopen_depthwise_convolution(
            x, w, None, [1, 0], [2, 1], [1, 2], 4, False, False
        ),
        lambda x, w: conv(x, w, None, *SPREAD, groups=4),
        X,
        (4, 1, 3, 2),
    ),
    "mps_convolution_backward": (
        lambda ct, x, w: aten.mps_convolution_backward(
            x, ct, w, [1, 0], [1, 2], [1, 1], 1, [True, True, True]
        ),
        conv_backward,
        (2, 6, 7, 3),
        X,
        W,
    ),
    "mps_convolution_transpose_backward": (
        lambda ct, x, w: aten.mps_convolution_transpose_backward(
            x, ct, w, [1, 0], [0, 0], [1, 2], [1, 1], 1, [True, True]
        ),
        lambda ct, x, w: conv_backward(ct, x, w, True, (True, True)),
        (2, 6, 7, 12),
        X,
        W_T,
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_kernels_of_other_devices(name):
    f, same, *shapes = ELSEWHERE[name]
    choices = list(batches(*shapes))
    for args, in_dims in (choices[0], choices[-1]):  # all are batched, or the last alone
        rows = [
            same(*(a if d is None else a[i] for a, d in zip(args, in_dims, strict=True)))
            for i in range(B)
        ]
        actual = lamina.vmap(f, in_dims)(*args)
        if isinstance(actual, torch.Tensor):
            actual, rows = (actual,), [(row,) for row in rows]
        expected = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        torch.testing.assert_close(tuple(actual), expected)


def test_all_are_tested():
    tables = (*ON_CPU, *SINGLE, *ELSEWHERE, "dequantize")
    named = {name.partition(",")[0].partition(" of")[0] for name in tables}
    assert named == {op._schema.name.removeprefix("aten::") for op in KERNELS}


def test_their_derivatives():
    torch.manual_seed(0)
    x, w = (torch.randn(shape, dtype=torch.float64) for shape in (X, W))

    def f(x, w):
        return aten.cudnn_convolution_relu(x, w, None, *SPREAD, 1).sin().sum()

    def same(x, w):
        return conv(x, w, None, *SPREAD).relu().sin().sum()

    both = (0, 1)
    torch.testing.assert_close(lamina.grad(f, both)(x, w), torch.func.grad(same, both)(x, w))
    tangents = (x.cos(), w.cos())
    torch.testing.assert_close(
        lamina.jvp(f, (x, w), tangents)[1], torch.func.jvp(same, (x, w), tangents)[1]
    )
