"""The tutorials and the benchmarks run, as a user runs them, in their short forms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: object) -> str:
    """Runs a program of the repository with this Python; returns what it printed."""
    sources = os.pathsep.join([str(ROOT / "core"), str(ROOT / "transforms")])
    environment = {**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_per_sample_gradients(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    out = run("tutorials/per_sample_gradients.py", "--epochs", 2, "--out", picture)
    assert "largest absolute difference" in out
    assert "epoch  2" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    ["conv_weights", "linearize", "memory", "models", "networks", "overhead", "vmap_ops"],
)
def test_benchmark(script, tmp_path):
    saved = tmp_path / "saved.json"
    out = run(f"benchmarks/{script}.py", "--quick", "--json", saved)
    tables = json.loads(saved.read_text())["tables"]
    assert tables
    for table in tables:
        assert f"### {table['title']}" in out
        assert not [note for note in table["notes"] if note.startswith("lamina failed")]
