"""A program, as text, and what that text may refer to."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def constant(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A float64 tensor that a program captures."""
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def index(seed: int, shape: tuple[int, ...], high: int) -> torch.Tensor:
    """An int64 tensor of values in [0, high) that a program captures."""
    return torch.randint(high, shape, generator=_generator(seed))


def mask(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A bool tensor that a program captures."""
    return torch.rand(shape, generator=_generator(seed)) > 0.4


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + seed)


class _PlainF:
    """`torch.nn.functional`, with compositions in place of wrong formulas.

    PyTorch's derivatives of layer_norm are wrong from the third order on: its double backward
    takes the mean and the variance for constants.
    """

    def __getattr__(self, name: str) -> Callable:
        return getattr(F, name)

    @staticmethod
    def layer_norm(x: torch.Tensor, shape: tuple[int, ...], eps: float) -> torch.Tensor:
        dims = tuple(range(-len(shape), 0))
        centred = x - x.mean(dims, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(dims, keepdim=True) + eps)


GLOBALS = {"torch": torch, "F": F, "constant": constant, "index": index, "mask": mask}


@dataclass(frozen=True)
class Program:
    """A function of two float64 tensors, as text.

    Attributes:
        x_shape: shape of the first argument.
        y_shape: shape of the second argument.
        out_shape: shape of the result.
        constants: one assignment a line, run once: the tensors that the function captures.
        lines: the statements of the body; the last one assigns or returns the result.
    """

    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    constants: tuple[str, ...]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*self.constants, "def f(x, y):", *("    " + s for s in self.lines)])

    def __repr__(self) -> str:
        header = f"# x: {self.x_shape}, y: {self.y_shape} -> {self.out_shape}"
        return "\n" + textwrap.indent(f"{header}\n{self}", "    ") + "\n"

    def compile(self, plain: bool = False) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The function that the text stands for.

        Args:
            plain: whether to avoid the operators whose higher derivatives are wrong in PyTorch.
        """
        scope = dict(GLOBALS)
        if plain:
            scope["F"] = _PlainF()
        exec(str(self), scope)
        return scope["f"]
