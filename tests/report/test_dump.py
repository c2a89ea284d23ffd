"""Dumped stages run by themselves, and the stages of one graph agree."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fxopt.report import dump as dump_module
from fxopt.report.dump import Dump
from fxopt.report.inputs import describe_inputs
from fxopt.report.record import GraphRecord, collect
from support.numerics import assert_closer
from support.reference import reference_mode, to_double
from support.zoo import ZOO

OUTPUT = re.compile(r"output (\d+): (\S+) \((.*)\) strides \((.*)\) checksum (\S+) not finite (\d+)")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.register_buffer("table", torch.arange(60.0).reshape(10, 6))

    def forward(self, x: torch.Tensor) -> Any:
        middle = nn.functional.dropout(nn.functional.gelu(self.up(x)), 0.1, False)
        return self.down(middle) + self.table[0] + torch.tensor([1.0, float("inf"), 2, 3, 4, 5]), x.shape[0]


class Checkpointed(Mlp):
    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(super().forward, x, use_reentrant=False)


def dump(
    model: Callable[..., Any], root: Path, *args: Any, dynamic: bool = False, **kwargs: Any
) -> list[Path]:
    """The files of the only graph of a call, in order."""
    options = {"host": "eager", "strict": True, "dump": str(root)}
    with collect() as found:
        torch.compile(model, backend="fxopt", options=options, dynamic=dynamic)(*args, **kwargs)
    assert len(found) == 1
    return sorted(root.glob("process_*/graph_*/*.py"))


def run(path: Path) -> str:
    """What the program prints, in a process of its own that knows nothing of this one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FXOPT", "TORCH"))}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd="/", env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def outputs(text: str) -> list[tuple[str, ...]]:
    return [found.groups()[:4] + found.groups()[5:] for found in OUTPUT.finditer(text)]


def check_agreement(paths: list[Path], first: Path, last: Path) -> None:
    """Last against first, by the rule by which fxopt's results are judged.

    The float64 reference is Dynamo's graph: of ATen calls the reference mode cannot widen the dtypes.
    """
    dynamo, early, late = (runpy.run_path(str(path)) for path in (paths[0], first, last))
    graph, inputs = dynamo["Graph"](), to_double(dynamo["inputs"]())
    with reference_mode(), torch.no_grad():
        exact = graph(*inputs)
    assert_closer(exact, late["run"](), early["run"](), what=last.name)


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_mlp(tmp_path: Path) -> None:
    paths = dump(Mlp(), tmp_path, torch.randn(3, 6))
    assert names(paths) == ["00_dynamo.py", "01_normalized.py", "02_eliminate-noops.py", "03_lowered.py"]
    said = [run(paths[0]), run(paths[1]), run(paths[-1])]
    for text in said:
        assert outputs(text) == [("0", "torch.float32", "3, 6", "6, 1", "3")]
    assert said[0] == said[1]
    check_agreement(paths, paths[1], paths[-1])
    heading = paths[-1].read_text()
    assert "Rewrites so far: eliminate-noops 1.\nWritten by fxopt" in heading
    assert f"{__file__}:" in heading
    assert "return self.down(middle) + self.table[0]" in heading


def test_tiny_llama(tmp_path: Path) -> None:
    llama = ZOO["llama"]
    paths = dump(llama.make_model(), tmp_path, **llama.make_inputs(mask="left"))
    stages = [name.partition("_")[2].removesuffix(".py") for name in names(paths)]
    assert stages[:2] == ["dynamo", "normalized"]
    assert stages[-1] == "lowered"
    assert len(stages) > 3
    first, last = outputs(run(paths[1])), outputs(run(paths[-1]))
    assert len(first) == 5
    assert first == last
    for path in paths[2:]:
        check_agreement(paths, paths[1], path)


def test_dynamic_shapes(tmp_path: Path) -> None:
    paths = dump(Mlp(), tmp_path, torch.randn(7, 6), dynamic=True)
    text = paths[-1].read_text()
    symbol = re.search(r"^(s\d+) = 7$", text, re.MULTILINE)
    assert symbol is not None
    assert re.search(rf"tensor\(\d, \({symbol[1]}, 6\), \(6, 1\), torch\.float32, 'cpu'\)", text)
    assert outputs(run(paths[-1])) == [("0", "torch.float32", "7, 6", "6, 1", "7")]
    assert "output 1: 7" in run(paths[-1])
    paths[-1].write_text(text.replace(symbol[0], f"{symbol[1]} = 11"))
    assert outputs(run(paths[-1])) == [("0", "torch.float32", "11, 6", "6, 1", "11")]


def test_checkpointed_body(tmp_path: Path) -> None:
    paths = dump(Checkpointed(), tmp_path, torch.randn(3, 6, requires_grad=True))
    for path in (paths[0], paths[1], paths[-1]):
        text = path.read_text()
        assert "class Graph_wrap_body_0(torch.nn.Module):" in text
        assert outputs(run(path))[0][2] == "3, 6"
    check_agreement(paths, paths[1], paths[-1])


def test_strides_and_expanded_inputs_are_kept(tmp_path: Path) -> None:
    x, y = torch.randn(4, 3).t(), torch.randn(4).expand(3, 4)
    paths = dump(lambda x, y: (x.sin() + y, y.cos()), tmp_path, x, y)
    inputs = runpy.run_path(str(paths[-1]))["inputs"]()
    assert [value.stride() for value in inputs] == [(1, 3), (0, 1)]
    assert [found[3] for found in outputs(run(paths[-1]))] == ["1, 3", "4, 1"]


def test_large_constants_stand_beside_the_file(tmp_path: Path) -> None:
    constant = torch.randn(100, generator=torch.Generator().manual_seed(5))

    def model(x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor(constant.tolist())

    paths = dump(model, tmp_path, torch.randn(100))
    stored = list(paths[0].parent.glob("constant_*.pt"))
    assert len(stored) == 1
    assert torch.equal(torch.load(stored[0]), constant)
    assert run(paths[-1]) == run(paths[0])


INDEXED: dict[str, Callable[..., Any]] = {
    "embedding": lambda ids, table: nn.functional.embedding(ids, table),
    "through a view and a cast": lambda ids, table: table[ids.view(-1).long()],
    "index_select": lambda ids, table: table.index_select(0, ids.flatten()),
    "gather": lambda ids, table: table.gather(0, ids),
    "second dimension": lambda ids, table: table.t()[:, ids],
    "checkpointed": lambda ids, table: checkpoint(
        lambda i, t: nn.functional.embedding(i, t), ids, table, use_reentrant=False
    ),
    "labels": lambda ids, table: nn.functional.cross_entropy(table.t()[:4].contiguous(), ids.flatten()[:4]),
}


@pytest.mark.parametrize("how", INDEXED)
@pytest.mark.parametrize("rows", [1, 5])
def test_integers_stay_in_range(how: str, rows: int, tmp_path: Path) -> None:
    ids, table = torch.zeros(2, 3, dtype=torch.int64), torch.randn(rows, 4)
    paths = dump(INDEXED[how], tmp_path, ids, table)
    namespace = runpy.run_path(str(paths[0]))
    given = next(value for value in namespace["inputs"]() if value.dtype == torch.int64)
    assert given.max() < rows
    assert rows == 1 or given.max() > 1
    for path in paths:
        runpy.run_path(str(path))["run"]()


def test_integers_that_index_nothing_are_a_mask_with_a_live_first_column(tmp_path: Path) -> None:
    mask = torch.ones(40, 9, dtype=torch.int64)
    paths = dump(lambda mask: mask.float() * 2, tmp_path, mask)
    (given,) = runpy.run_path(str(paths[-1]))["inputs"]()
    assert set(given.unique().tolist()) == {0, 1}
    assert given[:, 0].all()


def test_nothing_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.compile(Mlp(), backend="fxopt", options={"host": "eager"})(torch.randn(3, 6))
    assert list(tmp_path.iterdir()) == []


def test_the_environment_asks_for_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_DUMP", str(tmp_path))
    torch.compile(Mlp(), backend="fxopt", options={"host": "eager"})(torch.randn(3, 6))
    assert len(list(tmp_path.glob("process_*/graph_*/*.py"))) == 4


def test_what_was_written_before_is_not_overwritten(tmp_path: Path) -> None:
    record = GraphRecord(3, compile_id="1/2")
    directories = [Dump.open(str(tmp_path), record).directory for _ in range(3)]
    assert [path.name for path in directories if path] == [
        "graph_003_1-2",
        "graph_003_1-2__2",
        "graph_003_1-2__3",
    ]


@pytest.fixture
def warn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump_module, "_warned", False)


@pytest.mark.usefixtures("warn_again")
def test_a_directory_that_cannot_be_written_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options = {"host": "eager", "strict": True, "dump": str(tmp_path / "file")}
    x = torch.ones(3)
    with pytest.warns(UserWarning, match="cannot write to") as found:
        out = torch.compile(lambda x: x.sin(), backend="fxopt", options=options)(x)
        torch.compile(lambda x: x.cos(), backend="fxopt", options=options)(x)
    assert torch.equal(out, x.sin())
    assert len([one for one in found if "fxopt" in str(one.message)]) == 1


@pytest.mark.usefixtures("warn_again")
def test_a_fault_in_writing_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("no text for this")

    monkeypatch.setattr(dump_module, "Program", fail)
    options = {"host": "eager", "strict": True, "dump": str(tmp_path)}
    with pytest.warns(UserWarning, match="no text for this") as found:
        torch.compile(lambda x: x.sin(), backend="fxopt", options=options)(torch.ones(3))
    assert len([one for one in found if "fxopt" in str(one.message)]) == 1
    assert list(tmp_path.rglob("*.py")) == []


def test_no_half_written_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.report.files import write_atomically

    target = tmp_path / "a.py"
    write_atomically(target, "old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.py"]
    assert target.read_text() == "old"


def test_what_cannot_be_run_says_so(tmp_path: Path) -> None:
    from fxopt.report.program import Program

    class Opaque:
        pass

    root = nn.Module()
    root.secret = Opaque()
    graph = torch.fx.Graph()
    graph.output((graph.get_attr("secret"),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gm = torch.fx.GraphModule(root, graph)
    text = Program(gm, describe_inputs(gm), ["A stage."]).text()
    assert "Not runnable as it is:\n- Graph_secret is a Opaque, which has no text" in text
    compile(text, "program", "exec")
