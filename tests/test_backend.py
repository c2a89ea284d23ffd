"""The ways in: by name, as a callable, as default backend, with modes and options."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import FxoptError, InternalError, UnknownOption
from fxopt.ir.contract import Miss
from fxopt.report.record import collect, records
from support.numerics import assert_closer

EAGER = {"host": "eager"}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def check(model: nn.Module, run: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(3, 6)
    with collect() as found:
        out = run(x)
    assert [record.normalized for record in found] == [True]
    assert_closer(model.double()(x.double()), out, model.float()(x))


def test_by_name() -> None:
    model = Mlp()
    check(model, torch.compile(model, backend="fxopt", options=EAGER))


def test_as_callable() -> None:
    model = Mlp()
    check(model, torch.compile(model, backend=fxopt.backend, options=EAGER))


def test_module_compile() -> None:
    model = Mlp()
    model.compile(backend="fxopt", options=EAGER)
    x = torch.randn(3, 6)
    with collect() as found:
        model(x)
    assert len(found) == 1


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_default_backend"), reason="torch has no default backend before 2.13"
)
def test_as_default_backend() -> None:
    model = Mlp()
    torch.compiler.set_default_backend("fxopt")
    try:
        check(model, torch.compile(model, options=EAGER))
    finally:
        torch.compiler.set_default_backend(None)


def test_listed_and_usable_with_nothing_imported() -> None:
    code = (
        "import torch; assert 'fxopt' in torch.compiler.list_backends();"
        "f = torch.compile(lambda x: x.sin() + 1, backend='fxopt', options={'host': 'eager'});"
        "x = torch.ones(3); assert torch.equal(f(x), x.sin() + 1);"
        "from fxopt.report.record import records; assert len(records()) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_reach_the_host(mode: str) -> None:
    from torch._inductor import list_mode_options

    from fxopt.hosts.inductor import config_patches
    from fxopt.options import Options

    patches = config_patches(Options.parse(mode))
    wanted = list_mode_options(mode) if mode != "default" else {}
    assert {key: patches[key] for key in wanted} == wanted


def test_inductor_host_with_a_mode() -> None:
    model = Mlp()
    check(model, torch.compile(model, backend="fxopt", mode="reduce-overhead"))


def test_unknown_option_is_raised_by_torch_compile_itself() -> None:
    with pytest.raises(UnknownOption, match="strict"):
        torch.compile(Mlp(), backend="fxopt", options={"strickt": True})


def test_unknown_option_without_the_plugin_is_raised_at_the_first_call() -> None:
    code = (
        "import torch\n"
        "f = torch.compile(lambda x: x + 1, backend='fxopt', options={'strickt': True})\n"
        "try: f(torch.ones(2))\n"
        "except Exception as error: assert 'UnknownOption' in repr(error) or 'strict' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    env = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


class _Broken:
    """A pass that fails at its first site."""

    name = "broken"
    anchors = (torch.ops.aten.gelu.default,)
    after = ()

    def match(self, node: torch.fx.Node) -> Miss:
        raise ZeroDivisionError("a fault")


def test_a_failing_pass_becomes_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.pipeline.load_passes", lambda: (_Broken(),))
    model = Mlp()
    check(model, torch.compile(model, backend="fxopt", options=EAGER))
    (entry,) = records()[-1].evidence
    assert (entry.status, entry.reason) == ("error", "ZeroDivisionError: a fault")


def test_strict_raises_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.pipeline.load_passes", lambda: (_Broken(),))
    compiled = torch.compile(Mlp(), backend="fxopt", options={**EAGER, "strict": True})
    with pytest.raises(Exception, match="bug in fxopt") as caught:
        compiled(torch.randn(3, 6))
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, InternalError)


def test_a_stage_that_fails_leaves_the_untouched_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("lowering is broken")

    monkeypatch.setattr("fxopt.pipeline.lower", fail)
    model = Mlp()
    x = torch.randn(3, 6)
    with collect() as found:
        out = torch.compile(model, backend="fxopt", options=EAGER)(x)
    assert torch.equal(out, model(x))
    assert found[0].failures == [("passes", "RuntimeError: lowering is broken")]


def test_fuel_and_disable() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, False) * nn.functional.dropout(x + 1, 0.5, False)

    x = torch.randn(4)
    for options, applied in (
        ({}, 2),
        ({"fuel": 1}, 1),
        ({"fuel": 0}, 0),
        ({"disable": "eliminate-noops"}, 0),
    ):
        torch.compiler.reset()
        fxopt.backend.reset()  # type: ignore[attr-defined]
        with collect() as found:
            out = torch.compile(f, backend="fxopt", options={**EAGER, **options})(x)
        assert torch.equal(out, f(x))
        assert len(found[0].applied("eliminate-noops")) == applied


def test_public_names() -> None:
    assert issubclass(UnknownOption, FxoptError)
    assert set(fxopt.__all__) <= set(dir(fxopt))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fxopt.nothing  # noqa: B018
