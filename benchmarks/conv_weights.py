"""What is the best way to the weight gradients of a convolution, one for each example?

`vmap(grad(loss))` of a convolutional layer needs one weight gradient per image: a sum over the
places of the output, of products of a cotangent and a window of the input. There is no kernel for
it, but many ways to it. The first table races them, on layers that networks are made of; the second
is `vmap(grad)` itself next to `torch.func`. The third does both on random layers, which nothing was
tuned to: a choice that only suits the layers above would show there. The last has a weight for each
example from the start, where forward and backward pass have a choice too.

* grouped: one convolution with as many groups as examples, which is what `torch.func` does.
* windows: a copy of every window, and one matrix product.
* rows: a smaller copy, and a matrix product for each row of the kernel.
* places: no copy of windows, and a matrix product for each element of the kernel.
* channels: the input's channels as images, the cotangents as kernels, the examples as groups.

    python benchmarks/conv_weights.py [--quick] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import harness
import lamina
from lamina.batching.rules.conv_weights import (
    Correlation,
    Plan,
    by_rows,
    by_windows,
    cheapest,
    correlation,
    run,
)

aten = torch.ops.aten
LIBRARIES: dict[str, Any] = {"lamina": lamina, "torch.func": torch.func}


class Layer(NamedTuple):
    """One convolution: `channels` -> `out`, on images of size `space`."""

    name: str
    channels: int
    out: int
    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1


LAYERS = [
    Layer("LeNet 1", 1, 6, (28, 28), (5, 5), padding=2),
    Layer("LeNet 2", 6, 16, (14, 14), (5, 5)),
    Layer("first of a CNN", 3, 16, (32, 32), (3, 3), padding=1),
    Layer("second of a CNN", 16, 32, (32, 32), (3, 3), padding=1),
    Layer("deep in a ResNet", 64, 64, (16, 16), (3, 3), padding=1),
    Layer("pointwise", 64, 128, (16, 16), (1, 1)),
    Layer("depthwise", 32, 32, (32, 32), (3, 3), padding=1, groups=32),
    Layer("stem", 3, 64, (64, 64), (7, 7), stride=2, padding=3),
    Layer("1-d", 20, 40, (256,), (5,), padding=2),
    Layer("3-d", 4, 8, (12, 12, 12), (3, 3, 3), padding=1),
    Layer("dilated", 16, 16, (24, 24), (3, 3), padding=2, dilation=2),
    Layer("4 groups", 40, 40, (16, 16), (3, 3), padding=1, groups=4),
]


def settings(layer: Layer) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation, one entry for each spatial dim."""
    rank = len(layer.kernel)
    return [layer.stride] * rank, [layer.padding] * rank, [layer.dilation] * rank


def weight_shape(layer: Layer) -> tuple[int, ...]:
    """[out, channels / groups, *kernel]."""
    return (layer.out, layer.channels // layer.groups, *layer.kernel)


def convolve(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """The layer, without a bias."""
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel)]
    return conv(x, weight, None, *settings(layer), layer.groups)


def grouped(c: Correlation, ct: Tensor, x: Tensor) -> Tensor:
    """The examples as groups."""
    size = x.shape[0]
    shape = [size * c.rows, c.columns // c.groups, *c.kernel]
    operands = ct.transpose(0, 1).flatten(1, 2), x.transpose(0, 1).flatten(1, 2)
    rest = (c.stride, c.padding, c.dilation, False, [0] * len(c.kernel), c.groups * size)
    weight = x.new_zeros([1]).expand(shape)
    mask = [False, True, False]
    out = aten.convolution_backward(*operands, weight, None, *rest, mask)[1]
    return out.unflatten(0, (size, c.rows))


def places(c: Correlation, ct: Tensor, x: Tensor) -> Tensor:
    """A product for each element of the kernel."""
    size = x.shape[0]
    x = F.pad(x, [p for p in reversed(c.padding) for _ in range(2)])
    ct = ct.flatten(3).reshape(size * c.groups, c.rows // c.groups, -1)
    outs = []
    for k in itertools.product(*map(range, c.kernel)):
        starts = [at * d for at, d in zip(k, c.dilation, strict=True)]
        ends = [s + (n - 1) * t + 1 for s, n, t in zip(starts, c.places, c.stride, strict=True)]
        met = x[(..., *map(slice, starts, ends, c.stride))]
        met = met.reshape(size * c.groups, c.columns // c.groups, -1)
        outs.append(torch.bmm(ct, met.mT))
    return torch.stack(outs, -1).reshape(size, c.rows, -1, *c.kernel)


def channels(c: Correlation, ct: Tensor, x: Tensor) -> Tensor:
    """The input's channels as images; stride and dilation change places. No groups of its own."""
    size, rank = x.shape[0], len(c.kernel)
    if c.groups > 1:
        raise ValueError("a layer with groups")
    kernels = ct.flatten(0, 2).unsqueeze(1)
    rest = (c.dilation, c.padding, c.stride, False, [0] * rank, size)
    out = aten.convolution(x[:, 0].transpose(0, 1), kernels, None, *rest)
    out = out[(..., *map(slice, c.kernel))].unflatten(1, (size, c.rows))
    return out.movedim(0, 2).contiguous()


def forms_of(layer: Layer, c: Correlation, x: Tensor) -> dict[str, Callable]:
    """The ways that the rule chooses from, in chunks of examples that fit in the cache."""
    copy = layer.channels * int(np.prod(layer.kernel)) * int(np.prod(c.places))
    copies = {by_windows: copy, by_rows: copy // layer.kernel[0] * layer.stride}
    plans = {form: Plan(form, max(1, 2**20 // copied)) for form, copied in copies.items()}
    taken = cheapest(c, x, x.shape[0])
    if taken is not None:
        plans[taken.form] = taken
    windows, rows = (partial(run, plans[form]) for form in (by_windows, by_rows))
    return {"windows": windows, "rows": rows, "grouped": grouped}


def operands(layer: Layer, batch: int) -> tuple[Correlation, Tensor, Tensor]:
    """The sizes, the cotangents and the inputs of a batch."""
    x = torch.randn(batch, 1, layer.channels, *layer.space)
    shape = weight_shape(layer)
    ct = torch.randn_like(convolve(layer, x.flatten(0, 1), torch.randn(shape))).unsqueeze(1)
    return correlation(ct, x, shape, settings(layer), layer.groups), ct, x


def chosen(c: Correlation, x: Tensor) -> str:
    """What the rule takes."""
    plan = cheapest(c, x, x.shape[0])
    return "grouped" if plan is None else {by_rows: "rows", by_windows: "windows"}[plan.form]


def describe(layer: Layer) -> str:
    """`6 -> 16, 5x5 on 14x14` and what is not usual."""
    parts = [
        f"{layer.channels} -> {layer.out}, {'x'.join(map(str, layer.kernel))} "
        f"on {'x'.join(map(str, layer.space))}"
    ]
    parts += [f"stride {layer.stride}"] if layer.stride > 1 else []
    parts += [f"dilation {layer.dilation}"] if layer.dilation > 1 else []
    parts += [f"{layer.groups} groups"] if layer.groups > 1 else []
    return ", ".join(parts)


def measure_forms(layers: list[Layer], batch: int, rounds: int, seconds: float) -> harness.Table:
    """The table of the ways, one row a layer."""
    names = ["grouped", "windows", "rows", "places", "channels"]
    table = harness.Table(
        f"Weight gradients of {batch} images, milliseconds",
        ["layer", "", *names, "chosen", "grouped / chosen"],
    )
    for layer in layers:
        c, ct, x = operands(layer, batch)
        forms = {**forms_of(layer, c, x), "places": places, "channels": channels}
        thunks = {name: partial(forms[name], c, ct, x) for name in names}
        result = harness.race(
            {layer.name: thunks}, rounds=rounds, min_seconds=seconds, rtol=1e-2, atol=1e-2
        )
        times = result.seconds[layer.name]
        choice = chosen(c, x)
        table.add(
            layer.name,
            describe(layer),
            *(harness.median(times[name]) * 1e3 for name in names),
            choice,
            harness.median(times["grouped"] / times[choice]),
        )
    return table


def per_sample(lib: Any, layer: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    """Weight gradients of a small loss on the layer's output."""

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return convolve(layer, x, weight).square().mean()

    return lib.vmap(lib.grad(loss), in_dims=(None, 0))


def measure_transforms(
    title: str, layers: list[Layer], batch: int, rounds: int, seconds: float
) -> harness.Table:
    """`vmap(grad)` in both libraries, and how far the choice is from the best of its ways."""
    table = harness.Table(
        title,
        ["layer", "", "lamina ms", "torch.func ms", "ratio", "chosen", "chosen / best"],
    )
    for layer in layers:
        c, ct, x = operands(layer, batch)
        weight = torch.randn(weight_shape(layer)) / 10
        result = harness.race(
            {
                "vmap(grad)": {
                    name: partial(per_sample(lib, layer), weight, x)
                    for name, lib in LIBRARIES.items()
                },
                "forms": {name: partial(f, c, ct, x) for name, f in forms_of(layer, c, x).items()},
            },
            rounds=rounds,
            min_seconds=seconds,
            rtol=1e-2,
            atol=1e-2,
        )
        whole, forms = result.seconds["vmap(grad)"], result.seconds["forms"]
        choice = chosen(c, x)
        best = min(forms, key=lambda name: harness.median(forms[name]))
        table.add(
            layer.name,
            describe(layer),
            *(harness.median(whole[who]) * 1e3 for who in LIBRARIES),
            harness.median(whole["lamina"] / whole["torch.func"]),
            choice,
            harness.median(forms[choice] / forms[best]),
        )
        table.note_failures(result.failures)
    return table


MEMBERS = [
    Layer("pointwise", 64, 128, (16, 16), (1, 1)),
    Layer("pointwise, narrow", 16, 16, (32, 32), (1, 1)),
    Layer("pointwise, groups", 32, 32, (16, 16), (1, 1), groups=4),
    Layer("pointwise, 1-d", 24, 40, (256,), (1,)),
    Layer("3x3", 16, 32, (16, 16), (3, 3), padding=1),
]


def measure_members(layers: list[Layer], rounds: int, seconds: float) -> harness.Table:
    """An ensemble: a weight and a batch of images for each of its members."""
    members, images = 8, 16
    table = harness.Table(
        f"{members} members with weights of their own, {images} images each",
        ["layer", "", "", "lamina ms", "torch.func ms", "ratio"],
    )
    for layer in layers:
        x = torch.randn(members, images, layer.channels, *layer.space)
        weight = torch.randn(members, *weight_shape(layer)) / 10

        def output(weight: Tensor, x: Tensor, layer: Layer = layer) -> Tensor:
            return convolve(layer, x, weight)

        def loss(weight: Tensor, x: Tensor, layer: Layer = layer) -> Tensor:
            return convolve(layer, x, weight).square().mean()

        cases = {
            "vmap": {name: partial(lib.vmap(output), weight, x) for name, lib in LIBRARIES.items()},
            "vmap(grad)": {
                name: partial(lib.vmap(lib.grad(loss, argnums=(0, 1))), weight, x)
                for name, lib in LIBRARIES.items()
            },
        }
        result = harness.race(cases, rounds=rounds, min_seconds=seconds, rtol=1e-2, atol=1e-2)
        for case, times in result.seconds.items():
            table.add(
                layer.name,
                describe(layer),
                str(case),
                *(harness.median(times[name]) * 1e3 for name in LIBRARIES),
                harness.median(times["lamina"] / times["torch.func"]),
            )
        table.note_failures(result.failures)
    return table


def random_layers(count: int) -> list[Layer]:
    """Layers from a generator with a seed of its own, none of them too large for a benchmark."""
    draw = random.Random(2024)
    layers: list[Layer] = []
    while len(layers) < count:
        rank = draw.choice([1, 2, 2, 2, 3])
        groups = draw.choice([1, 1, 1, 2])
        fan_in, fan_out = (groups * draw.choice([1, 3, 5, 8, 12, 16, 30, 64]) for _ in range(2))
        side = draw.choice({1: [100, 400], 2: [9, 15, 24, 40], 3: [7, 10]}[rank])
        kernel = (draw.choice([1, 2, 3, 4, 5]),) * rank
        stride, dilation = draw.choice([1, 1, 2]), draw.choice([1, 1, 1, 2])
        padding = draw.choice([0, kernel[0] // 2 * dilation])
        work = fan_in * fan_out // groups * (kernel[0] * side // stride) ** rank
        copy = fan_in * (kernel[0] * side // stride) ** rank
        if dilation * (kernel[0] - 1) < side and work < 1e7 and copy < 1e6:
            name = f"random {len(layers) + 1}"
            where = ((side,) * rank, kernel, stride, padding, dilation, groups)
            layers.append(Layer(name, fan_in, fan_out, *where))
    return layers


def main(arguments: list[str] | None = None) -> harness.Report:
    """Runs the four measurements; returns what it printed."""
    report = harness.start("Weight gradients of convolutions, one for each example.", arguments)
    quick = report.settings.quick
    batch, rounds, seconds = (4, 3, 0.001) if quick else (64, 9, 0.01)
    layers = LAYERS[:4] if quick else LAYERS
    report.add(measure_forms(layers, batch, rounds, seconds))
    title = "vmap(grad) of a layer"
    report.add(measure_transforms(title, layers, batch, rounds, seconds))
    drawn = random_layers(4 if quick else 15)
    title = "vmap(grad) of layers drawn at random"
    report.add(measure_transforms(title, drawn, batch, rounds, seconds))
    report.add(measure_members(MEMBERS[:1] if quick else MEMBERS, rounds, seconds))
    report.save()
    return report


if __name__ == "__main__":
    main()
