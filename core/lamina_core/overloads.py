"""The ops that rules name, of which the running torch may lack some: `aten.cholesky.default`.

Torch drops ops and gains them, and a table of rules is written for all versions at once. So rule
files name ops through `aten` of this module (or `overloads("mkldnn")`, for another namespace) where
they would use `torch.ops.aten`. An overload that exists is the `OpOverload` itself. One that does
not is an `Absent`: tables may be keyed by it and rules registered for it, and nothing comes of it.
To call it is an error.

Which names are only misspelt is for the tests to say: an op that no torch has is in no version's
list of them.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from lamina_core.errors import AbsentOpError, message

__all__ = ["NAMESPACES", "Absent", "Namespace", "Packet", "aten", "is_absent", "overloads"]


class _NoArguments:
    """The schema of an op that is not there."""

    def __init__(self, name: str, overload: str) -> None:
        self.name = name
        self.overload_name = overload
        self.arguments: list[Any] = []
        self.returns: list[Any] = []


class Absent:
    """An overload that the running torch does not have.

    It has the attributes of an `OpOverload` that takes and gives nothing, so that code which looks
    at every op of a table, such as `lamina_core.schema.facts`, need not know of it.
    """

    is_view = False
    tags: tuple[Any, ...] = ()

    def __init__(self, namespace: str, packet: str, overload: str) -> None:
        self.namespace = namespace
        self.__name__ = f"{packet}.{overload}"
        self._overloadname = overload
        self._schema = _NoArguments(
            f"{namespace}::{packet}", "" if overload == "default" else overload
        )
        self._op = self.decompose = self.__call__

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say that there is no such op."""
        raise AbsentOpError(
            message(
                f"torch {torch.__version__} has no op {self}",
                "to fix: use what took its place in this version, or a torch that has the op",
            )
        )

    def name(self) -> str:
        """The name for the dispatcher: `aten::cholesky`."""
        overload = self._schema.overload_name
        return f"{self._schema.name}.{overload}" if overload else self._schema.name

    def __repr__(self) -> str:
        return f"<Absent {self}>"

    def __str__(self) -> str:
        return f"{self.namespace}.{self.__name__}"


def is_absent(op: Any) -> bool:
    """Whether an op is one that the running torch does not have."""
    return type(op) is Absent


class Packet:
    """The overloads of one op, `aten.sum`; `aten.sum.dim_IntList` is an `OpOverload` or `Absent`.

    What is not the name of an overload is what torch's own packet makes of it.
    """

    def __init__(self, namespace: str, name: str, packet: Any) -> None:
        self._namespace = namespace
        self.__name__ = name
        self._packet = packet

    def __getattr__(self, name: str) -> Any:
        # Like torch, keep what was found where the next look-up finds it without coming here.
        if name.startswith("__"):
            raise AttributeError(name)
        found = getattr(self._packet, name, None)
        if found is None:
            found = Absent(self._namespace, self.__name__, name)
        setattr(self, name, found)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the overload that fits the arguments."""
        if self._packet is None:
            return Absent(self._namespace, self.__name__, "default")(*args, **kwargs)
        return self._packet(*args, **kwargs)

    def overloads(self) -> list[str]:
        """The names of the overloads that there are."""
        return [] if self._packet is None else list(self._packet.overloads())

    def __repr__(self) -> str:
        return f"<Packet {self._namespace}.{self.__name__}>"


class Namespace:
    """The ops of one library, as `torch.ops` has them, of which some may be absent.

    Example:
        >>> from lamina_core.overloads import Namespace
        >>> aten = Namespace("aten")
        >>> aten.sum.dim_IntList is torch.ops.aten.sum.dim_IntList
        True
        >>> aten.sum.along_the_diagonal
        <Absent aten.sum.along_the_diagonal>
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._ops = getattr(torch.ops, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__") and not hasattr(self._ops, name):
            raise AttributeError(name)
        found = Packet(self._name, name, getattr(self._ops, name, None))
        setattr(self, name, found)
        return found

    def __dir__(self) -> list[str]:
        return list(dir(self._ops))

    def __repr__(self) -> str:
        return f"<Namespace {self._name}>"


# The libraries of ops that come with torch and that rules may be about.
NAMESPACES = frozenset(
    {
        "_c10d_functional",
        "_c10d_functional_autograd",
        "_quantized",
        "aten",
        "mkldnn",
        "quantized",
        "torch_nn",
    }
)
_KNOWN: dict[str, Namespace] = {}


def overloads(namespace: str) -> Namespace:
    """The ops of a namespace; the same object each time."""
    found = _KNOWN.get(namespace)
    if found is None:
        found = _KNOWN[namespace] = Namespace(namespace)
    return found


aten: Any = overloads("aten")
