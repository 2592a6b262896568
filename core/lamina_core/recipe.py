"""`ViewRecipe`: how a wrapper was viewed out of another, so that it can be made again."""

from __future__ import annotations

from typing import Any

__all__ = ["ViewRecipe", "root_of"]


class ViewRecipe:
    """How a wrapper was viewed out of its parent.

    Attributes:
        parent: The wrapper that was viewed.
        op: The view op.
        args: Its arguments behind the parent.
        kwargs: Its keyword arguments.
        index: Which output of the op this view is, or None if it has one output.
        version: The version of the parent that the view shows.
    """

    __slots__ = ("args", "index", "kwargs", "op", "parent", "version")

    def __init__(self, parent: Any, op: Any, args: Any, kwargs: Any, index: int | None) -> None:
        self.parent = parent
        self.op = op
        self.args = args
        self.kwargs = kwargs
        self.index = index
        self.version = parent.version


def root_of(wrapper: Any) -> Any:
    """What a wrapper is a view of, through all views between; itself if it is none."""
    while wrapper.recipe is not None:
        wrapper = wrapper.recipe.parent
    return wrapper
