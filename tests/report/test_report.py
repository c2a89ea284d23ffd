"""How a report reads: rows grouped, misses counted, text, JSON and HTML of the same content."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fxopt.ir.contract import Cost, Evidence, Status
from fxopt.report.record import GraphRecord
from fxopt.report.report import Report
from fxopt.report.summary import Break, Recompile, group_sites, human_bytes, saved

MODEL = "/somewhere/site/model.py"
APPLIED, MISS, ILLEGAL = Status.APPLIED, Status.MISS, Status.ILLEGAL


def entry(
    rewrite: str,
    number: int,
    status: Status = APPLIED,
    *,
    line: int = 10,
    reason: str = "because",
    **more: Any,
) -> Evidence:
    if status is APPLIED:
        more = {"before": Cost(3000, 10, 6), "after": Cost(1000, 10, 1), **more}
    return Evidence(rewrite, f"anchor_{number}", f"{MODEL}:{line}", status, reason, **more)


class Watched:
    """What `fxopt.report.watch.Watch` knows after a run."""

    breaks = [Break("/home/me/train.py:7", "a call of `print`", "a call of `print`\nHint: <do> not", 2)]
    recompiles = [Recompile("3/1", "/home/me/train.py:2", "step", ("tensor 'x' size mismatch",))]


def record(evidence: list[Evidence], **more: Any) -> GraphRecord:
    fields: dict[str, Any] = {
        "compile_id": "0/0",
        "nodes": 200,
        "inputs": 7,
        "normalized": True,
        "host": "eager",
    }
    return GraphRecord(0, evidence=evidence, seconds={"normalize": 0.5, "host": 2.0}, **fields | more)


def layers(count: int) -> list[Evidence]:
    """What `count` identical layers leave: one attention each, and a multiplication that is no norm."""
    found: list[Evidence] = []
    for layer in range(count):
        detail = f"%attention_{layer} : [num_users=1] = call_function[target=x](args = (%q_{layer},))"
        found.append(entry("rewrite-attention", layer, detail=detail))
        found.append(entry("fuse-rms-norm", layer, MISS, reason=f"wanted a mean, saw mul_{layer}"))
    return found


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setenv("COLUMNS", "120")  # narrow terminals get fewer columns
    evidence = [
        *layers(32),
        entry("rewrite-attention", 32, ILLEGAL, line=90, reason="the probabilities escape"),
    ]
    chosen = {f"attention_{layer}": "sdpa" for layer in range(32)}
    made = Report([record(evidence, chosen=chosen)], Watched(), subject="Net")
    made.calls = 1
    return made


def test_layers_share_a_row(report: Report) -> None:
    lines = str(report).splitlines()
    rows = [line for line in lines if line.strip().startswith("rewrite-attention") and "applied" in line]
    assert len(rows) == 1
    assert re.search(r"32 applied +sdpa +96 -> 32 kB +192 -> 32 +model\.py:10", rows[0])
    assert any("1 illegal" in line and "model.py:90" in line for line in lines)
    assert "the probabilities escape" in str(report)


def test_misses_are_counted_not_listed(report: Report) -> None:
    text = str(report)
    assert re.search(r"fuse-rms-norm 32: 32 x wanted a mean, saw mul_0$", text, re.MULTILINE)
    assert text.count("wanted a mean") == 1
    assert not re.search(r"\bmiss\b", text)


def test_verbose_lists_every_site(report: Report) -> None:
    text = str(report.verbose())
    assert len(re.findall(r"anchor_\d+\b", text)) == 65
    assert len(re.findall(r"\bmiss\b", text)) == 32
    assert "Hint: <do> not" in text
    assert len(str(report)) < len(text) / 4


def test_summary_is_one_line(report: Report) -> None:
    assert report.summary == (
        "1 graph, 1 break, 1 recompile; 32 of 65 sites rewritten (rewrite-attention 32 of 33, "
        "fuse-rms-norm 0 of 32), 64 kB of memory traffic and 160 launches saved"
    )
    assert report.summary in " ".join(str(report).split())


def test_summary_names_what_was_left_to_the_host() -> None:
    bare = record([], normalized=False, refusals=[("normalize", "a sparse input")], host="inductor")
    broken = record([entry("a-pass", 0, Status.ERROR)], failures=[("passes", "KeyError: 'x'")])
    report = Report([bare, broken])
    assert report.summary == (
        "2 graphs; 0 of 1 site rewritten (a-pass 0 of 1); 1 graph left to the host; "
        "1 graph where fxopt failed; 1 fault in passes"
    )
    text = " ".join(str(report).split())
    assert "left to the host, normalize refused: a sparse input" in text
    assert "passes failed: KeyError: 'x'" in text


def test_without_a_graph() -> None:
    report = Report([], Watched())
    assert report.summary == "0 graphs, 1 break, 1 recompile; no site rewritten"
    assert "Graph breaks" in str(report)
    assert json.loads(report.to_json())["graphs"] == []


@pytest.mark.parametrize("width", [80, 100, 140, 200])
def test_rich_and_print_say_the_same(report: Report, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(report)
    assert out.getvalue().split() == str(report).split()
    assert max(map(len, str(report).splitlines())) <= width
    assert ("192 -> 32" in str(report)) == (width >= 110)


def test_markup_in_texts_is_text() -> None:
    evidence = [entry("a-pass", 0, ILLEGAL, reason="wanted [bold]x[/bold], saw [0/0]")]
    assert "wanted [bold]x[/bold], saw [0/0]" in str(Report([record(evidence)]))


def test_one_outcome_at_many_lines_is_one_row() -> None:
    few = group_sites([record([entry("a-pass", n, line=n) for n in range(3)])])
    many = group_sites([record([entry("a-pass", n, line=n) for n in range(4)])])
    assert [group.count for group in few] == [1, 1, 1]
    assert [(group.count, len(group.locations)) for group in many] == [(4, 4)]
    assert "model.py:0 (+3 lines)" in str(Report([record([entry("a-pass", n, line=n) for n in range(4)])]))


def test_the_provider_of_what_a_later_pass_replaced() -> None:
    evidence = [
        entry("first", 0, detail="%attention_default : [num_users=1] = call_function[target=t]"),
        Evidence("second", "attention_default", "-", APPLIED, "", "%other : x", Cost(1, 1, 1), Cost(1, 1, 1)),
        entry("no-op", 1, detail="%other : x", before=Cost(9, 9, 1), after=Cost()),
    ]
    groups = group_sites([record(evidence, chosen={"other": "kernel"})])
    assert [group.provider for group in groups] == ["kernel", "kernel", ""]


def test_costs_are_summed() -> None:
    assert saved([record([entry("a", 0), entry("b", 1)]), record([entry("a", 2)])]) == Cost(6000, 0, 15)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ((0,), "0 B"),
        ((999,), "999 B"),
        ((1234,), "1.23 kB"),
        ((35_800, 500), "35.8 -> 0.5 kB"),
        ((-2e6,), "-2 MB"),
    ],
)
def test_human_bytes(counts: tuple[float, ...], text: str) -> None:
    assert human_bytes(*counts) == text


def test_json_is_stable(report: Report) -> None:
    """Tools read this: a field that goes, or changes its type, needs a new schema version."""
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert (data["schema"], data["schema_version"]) == ("fxopt-report", 1)
    assert set(data) == {
        *("schema", "schema_version", "versions", "subject", "calls"),
        *("summary", "graphs", "breaks", "recompiles"),
    }
    assert data["summary"]["passes"] == {
        "rewrite-attention": {"applied": 32, "sites": 33},
        "fuse-rms-norm": {"applied": 0, "sites": 32},
    }
    assert data["summary"]["saved"] == {"bytes": 64_000, "flops": 0, "launches": 160}
    (graph,) = data["graphs"]
    assert set(graph) == {
        *("index", "compile_id", "location", "nodes", "inputs", "dynamic", "backward", "normalized", "host"),
        *("seconds", "pass_seconds", "linears", "refusals", "failures", "error", "sites", "providers"),
    }
    assert len(graph["sites"]) == 65
    assert graph["sites"][0] == {
        "pass": "rewrite-attention",
        "status": "applied",
        "location": f"{MODEL}:10",
        "anchor": "anchor_0",
        "reason": "because",
        "detail": "%attention_0 : [num_users=1] = call_function[target=x](args = (%q_0,))",
        "provider": "sdpa",
        "before": {"bytes": 3000, "flops": 10, "launches": 6},
        "after": {"bytes": 1000, "flops": 10, "launches": 1},
    }
    assert data["breaks"] == [vars(Watched.breaks[0])]
    assert data["recompiles"][0]["reasons"] == ["tensor 'x' size mismatch"]
    assert json.loads(Report([]).to_json())["breaks"] is None


class _Page(HTMLParser):
    """Checks nesting, collects visible text and everything that could be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script", "pre"):
            self.text.append(data)


def test_html_is_one_page(report: Report, tmp_path: Path) -> None:
    path = report.to_html(tmp_path / "deep" / "report.html")
    source = path.read_text()
    page = _Page()
    page.feed(source)
    assert page.open == []
    assert page.links == []
    assert not re.search(r"https?://|@import|url\(", source)
    text = " ".join(page.text)
    for wanted in (report.summary, "32 applied", "the probabilities escape", "model.py:90", "sdpa", "3/1"):
        assert wanted in text
    assert "size mismatch" in text
    assert source.count('<tr><td>rewrite-attention</td><td><span class="tag') == 2


def test_html_escapes_what_it_shows(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script> & "quotes"'
    evidence = [entry("a-pass", 0, ILLEGAL, reason=evil, detail=evil)]
    report = Report([record(evidence, location=evil, failures=[("passes", evil)])], subject=evil)
    source = report.to_html(tmp_path / "report.html").read_text()
    assert "<script>alert" not in source
    page = _Page()
    page.feed(source)
    assert page.open == []


def test_html_of_an_empty_report(tmp_path: Path) -> None:
    page = _Page()
    page.feed(Report([]).to_html(tmp_path / "report.html").read_text())
    assert page.open == []
    assert "not watched" in " ".join(page.text)
