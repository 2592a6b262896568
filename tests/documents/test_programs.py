"""The tutorials and the benchmarks run, as a user runs them, in their short forms."""

import json
import os
import re
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
def test_custom_rules_and_memory():
    out = run("tutorials/custom_rules_and_memory.py")
    assert out.count("[0.0474, 0.5, 1.0]") == 2, "the rule of log1pexp, and sigmoid"
    through_the_loop, with_a_rule = map(float, re.findall(r"keeps +([\d.]+) KiB", out))
    assert with_a_rule < through_the_loop
    assert out.count("1 run of the loss") >= 5
    peaks = [float(peak) for peak in re.findall(r"([\d.]+) MiB at the peak", out)]
    assert len(peaks) == 4
    assert max(peaks) == peaks[0]
    assert min(peaks) == peaks[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "conv_weights",
        "import_time",
        "linearize",
        "memory",
        "models",
        "networks",
        "overhead",
        "rows",
        "vmap_ops",
    ],
)
def test_benchmark(script, tmp_path):
    saved = tmp_path / "saved.json"
    out = run(f"benchmarks/{script}.py", "--quick", "--json", saved)
    tables = json.loads(saved.read_text())["tables"]
    assert tables
    for table in tables:
        assert f"### {table['title']}" in out
        assert not [note for note in table["notes"] if note.startswith("lamina failed")]
