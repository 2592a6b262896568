"""The harness that every benchmark measures with."""

import argparse
import json
import math
import time

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline

from benchmarks import harness

UNIT = 2**16  # bytes in 128 x 128 floats


def quick_race(**contenders):
    return harness.race({"case": contenders}, rounds=3, min_seconds=0.001)


def test_race_pairs_the_rounds_of_contenders():
    slow, fast = (lambda: time.sleep(0.004)), (lambda: time.sleep(0.001))
    seconds = quick_race(slow=slow, fast=fast).seconds["case"]
    assert seconds["slow"].shape == (3,)
    assert harness.median(seconds["slow"] / seconds["fast"]) > 1.5


def test_race_reports_a_contender_that_fails_and_runs_the_others():
    def refuse():
        raise NotImplementedError("no such thing\nand more")

    result = quick_race(lamina=refuse, peer=lambda: torch.ones(2))
    assert result.failures == {("case", "lamina"): "NotImplementedError: no such thing"}
    assert np.isnan(result.seconds["case"]["lamina"]).all()
    assert (result.seconds["case"]["peer"] > 0).all()


def test_race_refuses_contenders_that_disagree():
    with pytest.raises(AssertionError, match="case: lamina and peer disagree"):
        quick_race(lamina=lambda: torch.zeros(2), peer=lambda: torch.ones(2))


def test_peak_memory_counts_what_is_held_at_once():
    def one_at_a_time():
        for _ in range(5):
            torch.zeros(128, 128)

    assert harness.peak_memory(lambda: [torch.zeros(128, 128) for _ in range(5)]) == 5 * UNIT
    assert harness.peak_memory(one_at_a_time) == UNIT
    assert harness.peak_memory(lambda: None) == 0


def test_peak_memory_does_not_count_what_was_there_before():
    x = torch.zeros(128, 128)
    assert harness.peak_memory(lambda: x.sin().cos()) == 2 * UNIT
    assert harness.peak_memory(lambda: x.sin_()) == 0


def test_table_prints_as_markdown():
    table = harness.Table("Title", ["transform", "us/op", "ratio"])
    table.add("vmap", 1.2345, 0.5)
    table.add("vmap(grad)", 123.45, math.nan)
    table.note_failures({("vmap(grad)", "peer"): "TypeError: no"})
    assert_expected_inline(
        str(table),
        """\
### Title

| transform  | us/op | ratio |
| ---------- | ----: | ----: |
| vmap       |  1.23 |  0.50 |
| vmap(grad) |   123 |     - |

* peer failed on vmap(grad): TypeError: no
""",
    )


def test_table_wants_a_cell_for_each_column():
    with pytest.raises(ValueError, match="1 cells for 2 columns of 'Title'"):
        harness.Table("Title", ["a", "b"]).add("only one")


def test_report_saves_what_it_printed(tmp_path, capsys):
    paths = {"json": tmp_path / "new" / "a.json", "markdown": tmp_path / "a.md"}
    report = harness.Report(argparse.Namespace(**paths))
    table = harness.Table("Title", ["name", "ratio"])
    table.add("x", math.nan)
    report.add(table)
    report.save()
    assert capsys.readouterr().out == f"{table}\n"
    assert str(table) in paths["markdown"].read_text()
    saved = json.loads(paths["json"].read_text())
    assert saved["tables"] == [
        {"title": "Title", "notes": [], "rows": [{"name": "x", "ratio": None}]}
    ]
    assert saved["environment"]["torch"] == torch.__version__
