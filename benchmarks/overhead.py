"""What does a transform cost in eager mode, next to torch.func?

On tensors of four elements arithmetic is free, so what remains is the price of interpretation. It
has two parts: a fixed one, for entering and leaving the transform, and one for each op. The fixed
part is the time of the identity of a number under the transform, which runs no op at all; the rest
is read off a chain of 50 ops (and the one sum behind it, for transforms that want a number).

The second table asks what that means for a job people run: per-sample gradients of a tiny
and of a middling network, with the parameters passed to `functional_call` and to a plain function.

    python benchmarks/overhead.py [--quick] [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor, nn

import harness
import lamina

OPS = 50
WIDTH = 4
BATCH = 8
CONTENDERS: dict[str, ModuleType] = {"lamina": lamina, "torch.func": torch.func}

Function = Callable[[Tensor], Tensor]


def chain(x: Tensor, ops: int) -> Tensor:
    """`ops` pointwise ops, sines and products in turn.

    Every product takes the input again: values and derivatives then stay away from zero however
    long the chain is (for inputs between 1 and 2), and the input has a fan-out, as weights do.
    """
    y = x
    for _ in range(ops // 2):
        y = y.sin() * x
    return y


def chain_sum(x: Tensor, ops: int) -> Tensor:
    """The chain with one number for a result, for the transforms that want one."""
    y = chain(x, ops)
    return y.sum() if y.dim() else y


# What each transform is applied to, as a function of the library and of the length of the chain.
# All inputs have WIDTH elements, behind one batch dim for each vmap.


def plain(lib: ModuleType, ops: int) -> Function:
    """No transform: what the ops themselves cost."""
    return partial(chain, ops=ops)


def vmap(lib: ModuleType, ops: int) -> Function:
    """One batch level."""
    return lib.vmap(partial(chain, ops=ops))


def vmap_vmap(lib: ModuleType, ops: int) -> Function:
    """Two batch levels."""
    return lib.vmap(lib.vmap(partial(chain, ops=ops)))


def grad(lib: ModuleType, ops: int) -> Function:
    """One reverse-mode level: a forward and a backward pass."""
    return lib.grad(partial(chain_sum, ops=ops))


def grad_grad(lib: ModuleType, ops: int) -> Function:
    """Reverse mode over reverse mode."""
    return lib.grad(lambda x: lib.grad(partial(chain_sum, ops=ops))(x).sum())


def vmap_grad(lib: ModuleType, ops: int) -> Function:
    """Per-sample gradients."""
    return lib.vmap(lib.grad(partial(chain_sum, ops=ops)))


def jvp(lib: ModuleType, ops: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """One forward-mode level; the tangent is the input itself."""
    return lambda x: lib.jvp(partial(chain, ops=ops), (x,), (x,))


def hessian(lib: ModuleType, ops: int) -> Function:
    """Forward mode over reverse mode, each under a vmap over a basis."""
    return lib.hessian(partial(chain_sum, ops=ops))


SUBJECTS: dict[str, tuple[Callable, tuple[int, ...]]] = {
    "plain": (plain, (WIDTH,)),
    "vmap": (vmap, (BATCH, WIDTH)),
    "vmap(vmap)": (vmap_vmap, (BATCH, BATCH, WIDTH)),
    "grad": (grad, (WIDTH,)),
    "grad(grad)": (grad_grad, (WIDTH,)),
    "vmap(grad)": (vmap_grad, (BATCH, WIDTH)),
    "jvp": (jvp, (WIDTH,)),
    "hessian": (hessian, (WIDTH,)),
}


def measure_chain(rounds: int, min_seconds: float) -> harness.Table:
    """The table of costs per op and per call, one row a transform."""
    table = harness.Table(
        f"Chain of {OPS} small ops (float32, {WIDTH} elements)",
        [
            "transform",
            "lamina us/op",
            "torch.func us/op",
            "ratio",
            "lamina us/call",
            "torch.func us/call",
            f"{OPS}-op ratio",
        ],
    )
    for name, (subject, shape) in SUBJECTS.items():
        x = 1 + torch.rand(shape)
        cases = {
            f"{name}, {ops} ops": {
                who: partial(subject(lib, ops), x if ops else x[..., 0])
                for who, lib in CONTENDERS.items()
            }
            for ops in (0, OPS)
        }
        result = harness.race(cases, rounds=rounds, min_seconds=min_seconds)
        trivial, full = result.seconds.values()
        per_op = {who: (full[who] - trivial[who]) / OPS for who in CONTENDERS}
        table.add(
            name,
            *(harness.median(per_op[who]) * 1e6 for who in CONTENDERS),
            harness.median(per_op["lamina"] / per_op["torch.func"]),
            *(harness.median(trivial[who]) * 1e6 for who in CONTENDERS),
            harness.median(full["lamina"] / full["torch.func"]),
        )
        table.note_failures(result.failures)
    return table


def mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers of the given sizes with tanh between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def module_loss(lib: ModuleType, model: nn.Module) -> Callable:
    """The loss of one example by way of the module, as most users write it."""

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = lib.functional_call(model, params, (x,))
        return nn.functional.cross_entropy(logits, y)

    return loss


def plain_loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The same loss written out, without a module's machinery around it."""
    weights = [p for name, p in params.items() if name.endswith("weight")]
    biases = [p for name, p in params.items() if name.endswith("bias")]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = torch.tanh(nn.functional.linear(x, weight, bias))
    return nn.functional.cross_entropy(nn.functional.linear(x, weights[-1], biases[-1]), y)


def measure_networks(rounds: int, min_seconds: float) -> harness.Table:
    """The table of per-sample gradients, one row a network and a style."""
    table = harness.Table(
        "Per-sample gradients, vmap(grad(loss))",
        ["network", "batch", "lamina us", "torch.func us", "ratio"],
    )
    for size, sizes, batch in [
        ("tiny MLP", [4, 8, 3], 8),
        ("middling MLP", [64, 256, 256, 10], 64),
    ]:
        model = mlp(sizes)
        params = {name: p.detach() for name, p in model.named_parameters()}
        x = torch.randn(batch, sizes[0])
        y = torch.randint(sizes[-1], (batch,))
        for style in ("functional_call", "plain function"):
            row = f"{size}, {style}"
            contenders = {}
            for who, lib in CONTENDERS.items():
                loss = module_loss(lib, model) if style == "functional_call" else plain_loss
                per_sample = lib.vmap(lib.grad(loss), in_dims=(None, 0, 0))
                contenders[who] = partial(per_sample, params, x, y)
            result = harness.race({row: contenders}, rounds=rounds, min_seconds=min_seconds)
            seconds = result.seconds[row]
            table.add(
                row,
                str(batch),
                *(harness.median(seconds[who]) * 1e6 for who in CONTENDERS),
                harness.median(seconds["lamina"] / seconds["torch.func"]),
            )
            table.note_failures(result.failures)
    return table


def main(arguments: list[str] | None = None) -> harness.Report:
    """Runs both measurements; returns what it printed."""
    report = harness.start("What a transform costs in eager mode, next to torch.func.", arguments)
    rounds, min_seconds = (5, 0.004) if report.settings.quick else (21, 0.02)
    report.add(measure_chain(rounds, min_seconds))
    report.add(measure_networks(rounds, min_seconds))
    report.save()
    return report


if __name__ == "__main__":
    main()
