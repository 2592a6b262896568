"""How tests are made of pairs of an operator and a law."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any


def curated_and_rest(metafunc: Any, pairs: Callable[..., Any], curated: Collection[str]) -> None:
    """Parametrizes a test by ("name", "law") of some operators, or ("other", "law") of the rest.

    The whole table, which takes seconds to read, is read only if all of it is to run.

    Args:
        metafunc: What `pytest_generate_tests` is given.
        pairs: Gives the pairs of some operators, or of all.
        curated: Operators.
    """
    if "other" in metafunc.fixturenames:
        wanted = "not exhaustive" not in metafunc.config.option.markexpr
        found = [pair for pair in pairs() if pair[0] not in curated] if wanted else []
        metafunc.parametrize(
            ("other", "law"), found or [("left out by -m", "")], ids=lambda value: value
        )
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize(("name", "law"), pairs(curated), ids=lambda value: value)
