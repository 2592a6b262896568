"""Hooks on the tape: what `Tensor.register_hook` and the hooks of modules ask to be called with.

A hook is user code of the level at which the backward pass runs, and is called once a pass. Modules
reach their gradients through `grad_fn`, for which `GradFn` stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from lamina_core.mode import thread_mode
from lamina_core.scopes import run_at

__all__ = ["GradFn", "Hooks", "hooks_of"]

_keys = itertools.count()


class Hooks:
    """The hooks of one node, in the order in which they were registered.

    Attributes:
        before: By key: the output it is for (None for all), and the function.
        after: By key: a function of the cotangents of the operands, and of the outputs.
    """

    __slots__ = ("after", "before")

    def __init__(self) -> None:
        self.before: dict[int, tuple[int | None, Callable[..., Any]]] = {}
        self.after: dict[int, Callable[..., Any]] = {}

    def on_outputs(self, received: list[Any]) -> list[Any]:
        """What the node has received, as the hooks leave it."""
        cts = list(received)
        with _user_code():
            for index, hook in list(self.before.values()):
                if index is None:
                    found = hook(tuple(cts))
                    if found is not None:
                        cts = list(found) if isinstance(found, tuple) else [found]
                elif cts[index] is not None:
                    found = hook(cts[index])
                    if found is not None:
                        cts[index] = found
        return cts

    def on_operands(self, cts: Any, received: list[Any]) -> Any:
        """What the pullback gave, as the hooks leave it."""
        with _user_code():
            for hook in list(self.after.values()):
                found = hook(tuple(cts), tuple(received))
                if found is not None:
                    cts = found if isinstance(found, tuple) else (found,)
        return cts


def _user_code() -> Any:
    top = thread_mode().top
    return nullcontext() if top is None else run_at(top)


class _Handle:
    """Takes a hook out again."""

    def __init__(self, home: dict[int, Any], hook: Any) -> None:
        self.home, self.key = home, next(_keys)
        home[self.key] = hook

    def remove(self) -> None:
        """Call the hook no more."""
        self.home.pop(self.key, None)

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


def hooks_of(node: Any) -> Hooks:
    """The hooks of a node, which has none until they are asked for."""
    if node.hooks is None:
        node.hooks = Hooks()
    found: Hooks = node.hooks
    return found


class GradFn:
    """What `tensor.grad_fn` gives of a tensor on a tape.

    Attributes:
        node: The node on the tape.
        metadata: A place for the user's own notes, as PyTorch has it.
    """

    def __init__(self, node: Any) -> None:
        self.node = node
        self.metadata: dict[str, Any] = {}

    def name(self) -> str:
        """The name that PyTorch would give the op, such as `MulBackward0`."""
        name: str = self.node.name
        if not name.startswith("aten."):
            return f"{name}Backward"
        words = name.split(".")[1].strip("_").split("_")
        return "".join(word[:1].upper() + word[1:] for word in words) + "Backward0"

    @property
    def next_functions(self) -> tuple[tuple[GradFn | None, int], ...]:
        """The operands, each as the op that made it and the number of its output."""
        return tuple(
            [
                (None, 0) if parent is None else (GradFn(parent[0]), parent[1])
                for parent in self.node.parents
            ]
        )

    def register_hook(self, hook: Any) -> _Handle:
        """Call `hook(grad_inputs, grad_outputs)` after the pullback; it may return other inputs."""
        return _Handle(hooks_of(self.node).after, hook)

    def register_prehook(self, hook: Any) -> _Handle:
        """Call `hook(grad_outputs)` before the pullback; it may return others."""
        return _Handle(hooks_of(self.node).before, (None, hook))

    def register_tensor_hook(self, index: int, hook: Any) -> _Handle:
        """Call `hook(grad)` with the whole cotangent of one output; it may return another."""
        return _Handle(hooks_of(self.node).before, (index, hook))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GradFn) and other.node is self.node

    def __hash__(self) -> int:
        return hash(id(self.node))

    def __repr__(self) -> str:
        return f"<{self.name()}>"
