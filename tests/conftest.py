"""What holds for all tests: the device they run on, and what the exhaustive ones check."""

from __future__ import annotations

import pytest

from lamina_core.config import config as settings
from tests import devices


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--device`."""
    parser.addoption(
        "--device",
        default="cpu",
        help="the device to run on: cuda, or toy, which needs no hardware (default: cpu)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Takes the device before the tests are imported: they make tensors while they are."""
    try:
        devices.use(config.getoption("--device"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> str:
    """Names the device at the top of the output."""
    return f"device: {devices.current()}"


@pytest.fixture
def device():
    """The device of this run; plain factories of `torch` make tensors on it."""
    return devices.current()


@pytest.fixture(autouse=True)
def _checked_answers(request, monkeypatch):
    """The exhaustive run checks every answer of every rule, as `LAMINA_DEBUG=1` does."""
    if request.node.get_closest_marker("exhaustive"):
        monkeypatch.setattr(settings, "debug", max(settings.debug, 1))
