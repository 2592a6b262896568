"""What do derivatives of networks cost, in time next to torch.func, in memory next to autograd?

An MLP, a small CNN and a transformer encoder with fused attention, all by way of `functional_call`.
Memory is compared with what `torch.autograd.grad` holds for the same batch; for per-sample
gradients, which it has no call for, with that and the room that the gradients themselves take.
With each block checkpointed, it is compared with `torch.autograd.grad` of the same checkpoints.

    python benchmarks/networks.py [--quick] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import harness
import lamina

CONTENDERS: dict[str, ModuleType] = {"lamina": lamina, "torch.func": torch.func}
DIRECTIONS = 8
Params = dict[str, Tensor]


@dataclass
class Network:
    """A module with a batch of inputs and labels, and random tangents of its parameters."""

    module: nn.Module
    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        self.params = {name: p.detach() for name, p in self.module.named_parameters()}
        self.tangents = {name: torch.randn_like(p) for name, p in self.params.items()}
        self.directions = torch.randn(DIRECTIONS, *self.x.shape)

    def loss(self, lib: ModuleType, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The mean cross entropy of a batch."""
        logits = lib.functional_call(self.module, params, (x,))
        return nn.functional.cross_entropy(logits, y)

    def example_loss(self, lib: ModuleType, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """The cross entropy of one example."""
        return self.loss(lib, params, x.unsqueeze(0), y.unsqueeze(0))


class Checkpointed(nn.Module):
    """A block that keeps its input alone, and runs again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """As the block does."""
        return checkpoint(self.block, x, use_reentrant=False)


class Head(nn.Linear):
    """Classifies a sequence of vectors by their mean."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] -> [batch, classes]."""
        return super().forward(x.mean(1))


def mlp(width: int, batch: int) -> Network:
    """Three linear layers with tanh between them."""
    module = nn.Sequential(
        nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )
    return Network(module, torch.randn(batch, width), torch.randint(10, (batch,)))


def cnn(channels: int, size: int, batch: int) -> Network:
    """Three convolutions with group norm, a pooling and a linear layer."""
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.ReLU()),
        nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * channels),
            nn.ReLU(),
        ),
        nn.Sequential(
            nn.Conv2d(2 * channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8 * channels, 10),
        ),
    )
    return Network(module, torch.randn(batch, 3, size, size), torch.randint(10, (batch,)))


def transformer(width: int, layers: int, length: int, batch: int) -> Network:
    """An encoder with four heads that reads sequences of vectors and classifies them."""
    x = torch.randn(batch, length, width)
    blocks = [
        nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        for _ in range(layers)
    ]
    return Network(nn.Sequential(*blocks, Head(width, 10)), x, torch.randint(10, (batch,)))


def checkpointed(net: Network) -> Network:
    """The same network with each of its blocks checkpointed."""
    return Network(nn.Sequential(*map(Checkpointed, net.module)), net.x, net.y)


# -------------------------------------------------------------------------------------- subjects


def grad(lib: ModuleType, net: Network) -> Any:
    """The gradient of a batch."""
    return lib.grad(partial(net.loss, lib))(net.params, net.x, net.y)


def vjp(lib: ModuleType, net: Network) -> Any:
    """Logits, and a cotangent of them pulled back."""

    def logits(params: Params) -> Tensor:
        return lib.functional_call(net.module, params, (net.x,))

    out, pullback = lib.vjp(logits, net.params)
    return out, pullback(torch.ones_like(out))


def jvp(lib: ModuleType, net: Network) -> Any:
    """The derivative along one direction."""
    f = partial(net.loss, lib)
    return lib.jvp(lambda params: f(params, net.x, net.y), (net.params,), (net.tangents,))


def linearize(lib: ModuleType, net: Network) -> Any:
    """The linear map at a point, made and applied once."""
    f = partial(net.loss, lib)
    loss, pushforward = lib.linearize(lambda params: f(params, net.x, net.y), net.params)
    return loss, pushforward(net.tangents)


def grad_grad(lib: ModuleType, net: Network) -> Any:
    """A Hessian-vector product, reverse over reverse."""

    def along(params: Params) -> Tensor:
        grads = lib.grad(partial(net.loss, lib))(params, net.x, net.y)
        return sum((grads[name] * t).sum() for name, t in net.tangents.items())

    return lib.grad(along)(net.params)


def jvp_grad(lib: ModuleType, net: Network) -> Any:
    """A Hessian-vector product, forward over reverse."""
    gradient = lib.grad(partial(net.loss, lib))
    return lib.jvp(lambda p: gradient(p, net.x, net.y), (net.params,), (net.tangents,))[1]


def hessian(lib: ModuleType, net: Network) -> Any:
    """The Hessian of the loss in eight directions of the input."""

    def shifted(steps: Tensor) -> Tensor:
        x = net.x + torch.tensordot(steps, net.directions, 1)
        return net.loss(lib, net.params, x, net.y)

    return lib.hessian(shifted)(torch.zeros(DIRECTIONS))


def vmap_grad(lib: ModuleType, net: Network, chunk_size: int | None = None) -> Any:
    """The gradient of each example."""
    gradient = lib.grad(partial(net.example_loss, lib))
    return lib.vmap(gradient, (None, 0, 0), chunk_size=chunk_size)(net.params, net.x, net.y)


SUBJECTS: dict[str, Callable[[ModuleType, Network], Any]] = {
    "grad": grad,
    "vjp": vjp,
    "jvp": jvp,
    "linearize": linearize,
    "grad(grad)": grad_grad,
    "jvp(grad)": jvp_grad,
    "hessian": hessian,
    "vmap(grad)": vmap_grad,
}


def measure_time(networks: dict[str, Network], rounds: int, min_seconds: float) -> harness.Table:
    """One row a network and transform."""
    table = harness.Table(
        "Time of derivatives of networks",
        ["network", "transform", "lamina ms", "torch.func ms", "ratio"],
    )
    for network, net in networks.items():
        for name, subject in SUBJECTS.items():
            row = f"{network}, {name}"
            contenders = {who: partial(subject, lib, net) for who, lib in CONTENDERS.items()}
            result = harness.race({row: contenders}, rounds=rounds, min_seconds=min_seconds)
            seconds = result.seconds[row]
            table.add(
                network,
                name,
                *(harness.median(seconds[who]) * 1e3 for who in CONTENDERS),
                harness.median(seconds["lamina"] / seconds["torch.func"]),
            )
            table.note_failures(result.failures)
    return table


# ---------------------------------------------------------------------------------------- memory


def autograd(net: Network) -> Any:
    """The gradient of a batch from PyTorch itself."""
    loss = nn.functional.cross_entropy(net.module(net.x), net.y)
    return torch.autograd.grad(loss, list(net.module.parameters()))


def room_of(tree: Any) -> int:
    """Bytes of the tensors in a tree."""
    return sum(leaf.nbytes for leaf in optree.tree_leaves(tree))


def measure_memory(networks: dict[str, Network]) -> harness.Table:
    """One row a network and transform, in units of what autograd needs."""
    table = harness.Table(
        "Peak memory of gradients of networks, in units of what torch.autograd needs",
        ["network", "transform", "torch.autograd MiB", "lamina", "torch.func"],
    )
    rows = dict(networks)
    for network, net in networks.items():
        rows[f"{network}, checkpointed"] = checkpointed(net)
    for network, net in sorted(rows.items()):
        plain = harness.peak_memory(partial(autograd, net))
        gradients = room_of(net.params) * len(net.x)
        for name, subject, unit in [
            ("grad", grad, plain),
            ("vmap(grad)", vmap_grad, plain + gradients),
        ]:
            peaks = {}
            for who, lib in CONTENDERS.items():
                try:
                    peaks[who] = harness.peak_memory(partial(subject, lib, net)) / unit
                except Exception as error:  # a refusal is a result, which the table reports
                    peaks[who] = math.nan
                    table.note_failures({(name, who): f"{type(error).__name__}: {error}"})
            table.add(network, name, unit / 2**20, *peaks.values())
    return table


def measure_chunks(network: str, net: Network) -> harness.Table:
    """What `chunk_size` saves: the peak beyond the gradients themselves."""
    table = harness.Table(
        f"Peak memory of vmap(grad, chunk_size=k) beyond its result: {network}, batch {len(net.x)}",
        ["k", "lamina MiB", "MiB per example of a chunk", "torch.func MiB"],
    )
    result = room_of(net.params) * len(net.x)
    size = len(net.x)
    while size:
        peaks = {
            who: (harness.peak_memory(partial(vmap_grad, lib, net, size)) - result) / 2**20
            for who, lib in CONTENDERS.items()
        }
        table.add(str(size), peaks["lamina"], peaks["lamina"] / size, peaks["torch.func"])
        size //= 2
    return table


def main(arguments: list[str] | None = None) -> harness.Report:
    """Runs all three measurements; returns what it printed."""
    report = harness.start("Derivatives of networks, in time and memory.", arguments)
    quick = report.settings.quick
    scale = 1 if quick else 4
    networks = {
        "MLP": mlp(64 * scale, 16 * scale),
        "CNN": cnn(4 * scale, 8 * scale, 4 * scale),
        "transformer": transformer(16 * scale, 1 if quick else 2, 8 * scale, 2 * scale),
    }
    rounds, min_seconds = (3, 0.002) if quick else (11, 0.02)
    report.add(measure_time(networks, rounds, min_seconds))
    del networks["MLP"]
    networks["transformer"] = transformer(16 * scale, 6, 16 * scale, 4 * scale)
    report.add(measure_memory(networks))
    report.add(measure_chunks("transformer", networks["transformer"]))
    report.save()
    return report


if __name__ == "__main__":
    main()
