"""`in_own_thread`: a function, run where no mode, guard or default of the caller reaches it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["in_own_thread"]

T = TypeVar("T")

_LONGEST_WAIT = 5.0  # seconds


def in_own_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread of its own, and wait until nothing of the thread is left.

    Before Python 3.13 a thread may be joined and still be dropping what C++ keeps for it. Torch
    keeps Python objects there (2.12 does after each `backward()`), and to drop one takes the
    interpreter: a process that is ending by then is aborted. Where the system does not list the
    threads of a process, there is nothing to wait by.

    Args:
        function: What to run.

    Returns:
        What it returns.

    Raises:
        BaseException: What it raises.

    Example:
        >>> in_own_thread(lambda: 1 + 1)
        2
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised in the thread of the caller
            errors.append(error)

    thread = threading.Thread(target=run, name="lamina")
    thread.start()
    thread.join()
    listed = Path(f"/proc/self/task/{thread.native_id}")
    end = time.monotonic() + _LONGEST_WAIT
    while listed.exists() and time.monotonic() < end:
        time.sleep(1e-4)  # others get the interpreter meanwhile
    if errors:
        raise errors[0]
    return results[0]
