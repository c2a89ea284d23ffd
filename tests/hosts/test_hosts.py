"""Which host compiles, and what happens where there is no compiler."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from fxopt.hosts import choose_host
from fxopt.hosts.eager import EAGER
from fxopt.hosts.inductor import INDUCTOR, config_patches, without_graphs
from fxopt.options import Options
from fxopt.report.record import collect

CPU = [torch.ones(2)]


def test_inductor_by_default() -> None:
    assert choose_host(Options(), CPU) is INDUCTOR


def test_eager_on_request() -> None:
    assert choose_host(Options(host="eager"), CPU) is EAGER


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_graph_that_is_recorded_by_somebody_else(mode: str) -> None:
    options = Options(mode=mode)
    assert config_patches(options)["triton.cudagraphs"] is True
    assert config_patches(without_graphs(options))["triton.cudagraphs"] is False


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt import hosts

    hosts._warn_once.cache_clear()
    monkeypatch.setattr(hosts, "missing_compiler", lambda: "no working compiler found")


@pytest.mark.usefixtures("no_compiler")
def test_eager_with_one_warning_without_a_compiler() -> None:
    with pytest.warns(UserWarning, match=r"Install g\+\+"):
        assert choose_host(Options(), CPU) is EAGER
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_host(Options(), CPU) is EAGER


@pytest.mark.usefixtures("no_compiler")
def test_inductor_on_request_is_not_replaced() -> None:
    assert choose_host(Options(host="inductor"), CPU) is INDUCTOR


@pytest.mark.usefixtures("no_compiler")
def test_graphs_without_a_cpu_tensor_need_no_cpp_compiler() -> None:
    assert choose_host(Options(), [torch.ones(2, device="meta")]) is INDUCTOR


def test_a_machine_without_a_compiler_runs_and_says_what_to_install() -> None:
    code = (
        "import torch, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    f = torch.compile(lambda x: x.sin() + 1, backend='fxopt')\n"
        "    assert torch.equal(f(torch.ones(3)), torch.ones(3).sin() + 1)\n"
        "    f(torch.ones(4, 2))\n"
        "assert sum('apt-get install g++' in str(w.message) for w in caught) == 1, caught\n"
    )
    env = {"CXX": "no-such-compiler", "PATH": "/nonexistent", "HOME": "/tmp"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_pooling_for_a_gpu_that_is_not_here() -> None:
    """Inductor's form of it asks a module that nothing has imported yet in a new process."""
    code = (
        "import torch, fxopt\n"
        "pool = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.MaxPool2d(2, ceil_mode=True))\n"
        "x = torch.randn(1, 2, 7, 6, requires_grad=True)\n"
        "options = {'host': 'eager', 'target': 'sm_90', 'strict': True}\n"
        "compiled = torch.compile(pool, backend='fxopt', options=options)\n"
        "torch.testing.assert_close(compiled(x), pool(x))\n"
        "(got,) = torch.autograd.grad(compiled(x).sum(), x)\n"
        "(want,) = torch.autograd.grad(pool(x).sum(), x)\n"
        "torch.testing.assert_close(got, want)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inductor_without_a_compiler_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.hosts import inductor

    monkeypatch.setattr(inductor, "missing_compiler", lambda: "none found")
    f = torch.compile(lambda x: x + 1, backend="fxopt", options={"host": "inductor"})
    with pytest.raises(Exception, match="apt-get install g\\+\\+"):
        f(torch.ones(2))


def test_a_host_that_rejects_the_rewritten_graph_gets_the_untouched_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fxopt import pipeline
    from fxopt.hosts.host import Host

    seen: list[int] = []

    def picky(gm: torch.fx.GraphModule, inputs: object, options: object, notes: object) -> object:
        seen.append(len(seen))
        if len(seen) == 1:
            raise RuntimeError("cannot compile this")
        return gm.forward

    monkeypatch.setattr(pipeline, "choose_host", lambda options, inputs: Host("picky", picky))
    with collect() as found:
        out = torch.compile(lambda x: x.sin() + 1, backend="fxopt")(torch.ones(2))
    assert torch.equal(out, torch.ones(2).sin() + 1)
    assert found[0].failures == [("host", "RuntimeError: cannot compile this")]
