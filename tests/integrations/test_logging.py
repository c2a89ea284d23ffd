"""``TORCH_LOGS="fxopt"`` in processes of their own: torch reads it while it is imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from fxopt.integrations.logging import evidence_line, summary_line
from fxopt.ir.contract import Cost, Evidence, Status
from fxopt.report.record import GraphRecord

PROGRAM = """
import torch

def model(x):
    return torch.nn.functional.dropout(x, 0.5, False).sin() + 1

torch.compile(model, backend="fxopt", options={"host": "eager"})(torch.ones(2))
"""
# torch's own prefix: level and date, time, process, file and line, compilation.
PREFIX = re.compile(
    r"^([IVW])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ \S*fxopt/integrations/logging\.py:\d+\] \[0/0\] (.*)$"
)


def said(tmp_path: Path, code: str = PROGRAM, **environ: str) -> str:
    """What a process writes to its standard error."""
    script = tmp_path / "script.py"
    script.write_text(dedent(code))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCH_")}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env=environment | environ,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def lines(text: str) -> list[tuple[str, str]]:
    """(level, message) of fxopt's lines."""
    found = [PREFIX.match(line) for line in text.splitlines()]
    return [(match[1], match[2]) for match in found if match]


@pytest.mark.parametrize("autoload", ["1", "0"])
def test_info_is_a_line_for_each_graph(tmp_path: Path, autoload: str) -> None:
    (line,) = lines(said(tmp_path, TORCH_LOGS="fxopt", TORCH_DEVICE_BACKEND_AUTOLOAD=autoload))
    assert line[0] == "I"
    assert re.match(
        rf"graph 0 \(0/0\) at {re.escape(str(tmp_path))}/script\.py:5: \d+ nodes, normalized, ", line[1]
    )
    assert "1 rewrite (eliminate-noops 1), host eager, normalize 0." in line[1]


def test_debug_adds_every_site(tmp_path: Path) -> None:
    found = lines(said(tmp_path, TORCH_LOGS="+fxopt"))
    assert [level for level, _ in found][:2] == ["I", "V"]
    (site,) = [text for _, text in found if "eliminate-noops applied" in text]
    assert site.startswith(f"graph 0: eliminate-noops applied at {tmp_path}/script.py:5 (dropout): ")


@pytest.mark.parametrize("setting", [{}, {"TORCH_LOGS": "-fxopt"}, {"TORCH_LOGS": "graph_breaks"}])
def test_silent_unless_asked(tmp_path: Path, setting: dict[str, str]) -> None:
    assert "graph 0" not in said(tmp_path, **setting)


def test_beside_torchs_own_artifacts(tmp_path: Path) -> None:
    text = said(tmp_path, TORCH_LOGS="graph_code,fxopt")
    assert "[__graph_code]" in text
    assert len(lines(text)) == 1


def test_set_logs(tmp_path: Path) -> None:
    setting = 'import logging, torch\ntorch._logging.set_logs(modules={"fxopt": logging.INFO})\n'
    assert [level for level, _ in lines(said(tmp_path, setting + PROGRAM))] == ["I"]


def test_refusals_and_failures(tmp_path: Path) -> None:
    code = (
        PROGRAM.replace("import torch\n", "import torch\nimport fxopt.pipeline as pipeline\n", 1).replace(
            "torch.compile(model", "pipeline.normalize = refuse\ntorch.compile(model"
        )
        + "pipeline.normalize = fail\ntorch.compile(lambda x: x + 2, backend='fxopt')(torch.ones(2))\n"
    )
    helpers = """
def refuse(*args):
    raise pipeline.CannotNormalize("not today")

def fail(*args):
    raise ZeroDivisionError("broken")
"""
    text = said(
        tmp_path, code.replace("\ndef model", f"{helpers}\ndef model"), TORCH_LOGS="fxopt", FXOPT_HOST="eager"
    )
    assert "graph 0: normalize refused: not today" in text
    assert "not normalized" in text
    assert "normalize failed, the graph goes to the host unchanged: ZeroDivisionError: broken" in text


def test_structured_trace_has_the_report(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    said(tmp_path, TORCH_TRACE=str(trace))
    (log,) = trace.iterdir()
    rows = log.read_text().splitlines()
    (at,) = [number for number, row in enumerate(rows) if '"fxopt_report"' in row]
    header = json.loads(rows[at].partition("] ")[2])
    assert header["artifact"] == {"name": "fxopt_report", "encoding": "json"}
    assert (header["frame_id"], header["frame_compile_id"]) == (0, 0)
    graph = json.loads(rows[at + 1])
    assert graph["normalized"] is True
    assert [site["pass"] for site in graph["sites"]] == ["eliminate-noops"]


def test_lines() -> None:
    entry = Evidence(
        "a-pass", "mul_1", "m.py:3", Status.ILLEGAL, "saw a write", "", Cost(8, 1, 2), Cost(4, 1, 1)
    )
    record = GraphRecord(7, location="m.py:1", nodes=9, evidence=[entry, entry], error="KeyError: 'x'\nmore")
    assert summary_line(record) == (
        "graph 7 at m.py:1: 9 nodes, not normalized, 0 rewrites, 2 illegal, ended by KeyError: 'x'"
    )
    assert evidence_line(entry) == (
        "a-pass illegal at m.py:3 (mul_1): saw a write [8 B, 1 flop, 2 launches -> 4 B, 1 flop, 1 launches]"
    )
