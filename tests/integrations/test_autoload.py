"""What `import torch` does with fxopt installed, each in a Python process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

# Printed last by a child: what it found, as JSON.
REPORT = "import json; print(json.dumps(found))"


def run(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCH_LOGS")}
    return subprocess.run(
        [sys.executable, "-c", dedent(code)],
        env=environment | environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def find(code: str, **environ: str) -> Any:
    """The value of `found` at the end of `code`."""
    done = run(f"{dedent(code)}\n{REPORT}", **environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_torch_loads_nothing_heavy() -> None:
    """Beside what torch itself loads there are only four small modules of fxopt."""
    found = find(
        """
        import importlib.metadata, sys
        everything = importlib.metadata.entry_points
        importlib.metadata.entry_points = lambda **params: [
            entry for entry in everything(**params) if entry.name != "fxopt"
        ]
        import torch
        without = set(sys.modules)
        importlib.metadata.entry_points = everything
        torch._import_device_backends()
        found = {"without": sorted(without), "added": sorted(set(sys.modules) - without)}
        """
    )
    assert not [name for name in found["without"] if name.partition(".")[0] == "fxopt"]
    assert found["added"] == [
        "fxopt",
        "fxopt.integrations",
        "fxopt.integrations.autoload",
        "fxopt.integrations.import_hooks",
    ]


def test_switched_off_nothing_of_fxopt_is_loaded() -> None:
    found = find(
        """
        import sys, torch
        found = {"modules": [name for name in sys.modules if name.partition(".")[0] == "fxopt"]}
        from fxopt.integrations import autoload
        from accelerate.utils import DynamoBackend
        found |= {"outcomes": autoload.outcomes(), "names": DynamoBackend.list()}
        """,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert found["modules"] == []
    assert found["outcomes"] == {}
    assert "FXOPT" not in found["names"]


def test_torch_first() -> None:
    found = find("""
        import torch
        from fxopt.integrations import autoload
        found = {"before": autoload.outcomes()["accelerate"]}
        from accelerate.utils import DynamoBackend
        found |= {"member": DynamoBackend("FXOPT").name, "after": autoload.outcomes()["accelerate"]}
        found |= {"failures": autoload.failures()}
    """)
    assert found["before"] == "waits until it is imported"
    assert found["after"] == "accelerate accepts the name since fxopt added it"
    assert found["member"] == "FXOPT"
    assert found["failures"] == {}


def test_accelerate_first() -> None:
    found = find("""
        import sys
        from accelerate.utils import DynamoBackend, TorchDynamoPlugin
        found = {"plugin": TorchDynamoPlugin(backend="fxopt").backend.name, "names": DynamoBackend.list()}
    """)
    assert found["plugin"] == "FXOPT"
    assert found["names"].count("FXOPT") == 1


def test_accelerate_absent() -> None:
    found = find("""
        import sys
        class NoAccelerate:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "accelerate":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, NoAccelerate())
        import torch
        try:
            import accelerate
        except ModuleNotFoundError as error:
            found = {"error": str(error)}
        from fxopt.integrations import autoload
        found |= {"outcomes": autoload.outcomes(), "failures": autoload.failures()}
        double = torch.compile(lambda x: x * 2, backend="fxopt", options={"host": "eager"})
        found["result"] = double(torch.ones(2)).tolist()
    """)
    assert found["error"] == "No module named 'accelerate'"
    assert found["outcomes"]["accelerate"] == "waits until it is imported"
    assert found["failures"] == {}
    assert found["result"] == [2.0, 2.0]


def make_accelerate(folder: Path, body: str) -> str:
    """A stand-in for accelerate with `body` as its `utils/dataclasses.py`; returns a PYTHONPATH."""
    utils = folder / "accelerate" / "utils"
    utils.mkdir(parents=True)
    (utils.parent / "__init__.py").write_text("")
    (utils / "__init__.py").write_text("")
    (utils / "dataclasses.py").write_text(dedent(body))
    return str(folder)


USE_STAND_IN = """
import torch
import accelerate.utils.dataclasses as module
import colorsys  # some module that nobody has loaded yet
from fxopt.integrations import autoload
found = {"outcome": autoload.outcomes()["accelerate"], "failures": autoload.failures()}
"""


def test_accelerate_that_knows_the_name(tmp_path: Path) -> None:
    body = """
        from enum import Enum
        class DynamoBackend(str, Enum):
            NO = "NO"
            FXOPT = "FXOPT"
    """
    found = find(
        USE_STAND_IN + "found['names'] = [member.name for member in module.DynamoBackend]",
        PYTHONPATH=make_accelerate(tmp_path, body),
    )
    assert found["outcome"] == "nothing to do: accelerate accepts the name"
    assert found["failures"] == {}
    assert found["names"] == ["NO", "FXOPT"]


def test_accelerate_without_the_enum(tmp_path: Path) -> None:
    found = find(USE_STAND_IN, PYTHONPATH=make_accelerate(tmp_path, "DynamoBackend = str\n"))
    assert found["outcome"].startswith("nothing to do: this accelerate does not check")
    assert found["failures"] == {}


def test_accelerate_that_is_half_loaded_when_torch_arrives(tmp_path: Path) -> None:
    body = """
        import torch
        from enum import Enum
        class DynamoBackend(str, Enum):
            NO = "NO"
    """
    found = find(
        USE_STAND_IN.replace("import torch\n", "") + "found['name'] = module.DynamoBackend('FXOPT').name",
        PYTHONPATH=make_accelerate(tmp_path, body),
    )
    assert found["name"] == "FXOPT"
    assert found["failures"] == {}


def test_failure_in_the_accelerate_hook_is_kept_and_contained(tmp_path: Path) -> None:
    body = """
        from enum import Enum, EnumMeta
        class Refusing(EnumMeta):
            def __call__(cls, value, *args, **kwargs):
                raise ValueError(value)
        class DynamoBackend(Enum, metaclass=Refusing):
            NO = "NO"
    """
    found = find(USE_STAND_IN, PYTHONPATH=make_accelerate(tmp_path, body))
    assert found["failures"]["accelerate"].startswith("UnknownEnumLayout: ")
    assert found["outcome"].startswith("failed: UnknownEnumLayout: ")


def test_failure_of_every_step_is_kept_and_contained() -> None:
    found = find("""
        import sys
        import fxopt.integrations.import_hooks as import_hooks
        def broken(*args):
            raise RuntimeError("broken on purpose")
        import_hooks.PostImportFinder.when_imported = broken
        import fxopt.integrations.autoload as autoload
        autoload._register_log = broken
        autoload._check_options_in_torch_compile = broken
        import torch
        found = {"sum": (torch.ones(2) + 1).sum().item(), "failures": autoload.failures()}
        found["outcomes"] = autoload.outcomes()
    """)
    assert found["sum"] == 4.0
    assert len(found["failures"]) == 3
    assert set(found["failures"].values()) == {"RuntimeError: broken on purpose"}
    for step in found["failures"]:
        assert found["outcomes"][step] == "failed: RuntimeError: broken on purpose"


def test_options_are_checked_by_torch_compile() -> None:
    """As with Inductor the mistake is reported where it is made, not at the first call of the model."""
    found = find("""
        import torch
        from fxopt.integrations import autoload
        from fxopt.errors import UnknownOption, UnsupportedMode
        def refused(error, **arguments):
            try:
                torch.compile(lambda x: x, backend="fxopt", **arguments)
            except error:
                return True
            return False
        found = {
            "option": refused(UnknownOption, options={"no_such_option": 1}),
            "mode": refused(UnsupportedMode, mode="no-such-mode"),
        }
        module = torch.nn.Linear(2, 2)
        try:
            module.compile(backend="fxopt", options={"no_such_option": 1})
        except UnknownOption:
            found["module"] = True
        torch.compile(module, backend="fxopt", options={"host": "eager"})
        torch.compile(module, backend="fxopt", mode="reduce-overhead")
        before = torch._TorchCompileWrapper.__init__
        autoload.autoload()
        found["wrapped once"] = torch._TorchCompileWrapper.__init__ is before
    """)
    assert found == {"option": True, "mode": True, "module": True, "wrapped once": True}


def test_other_backends_are_not_checked() -> None:
    found = find("""
        import torch
        def other(gm, example_inputs, **kwargs):
            return gm.forward
        def validate(**kwargs):
            raise AssertionError("called on a backend that is not fxopt's")
        other.validate = validate
        compiled = torch.compile(lambda x: x + 1, backend=other, options={"anything": 1})
        eager = torch.compile(lambda x: x + 1, backend="eager")
        found = [compiled(torch.ones(1)).item(), eager(torch.ones(1)).item()]
    """)
    assert found == [2.0, 2.0]


def test_torch_without_the_private_class() -> None:
    found = find("""
        import torch
        from fxopt.integrations import autoload
        del torch._TorchCompileWrapper
        autoload.autoload()
        found = {"outcomes": autoload.outcomes(), "failures": autoload.failures()}
    """)
    assert found["failures"] == {}
    assert found["outcomes"]["options checked by torch.compile"].startswith("not done: ")


def test_torch_logs_knows_fxopt() -> None:
    code = """
        import torch, logging
        logger = logging.getLogger("fxopt.some.module")
        logger.debug("a detail")
        logger.info("a fact")
        logger.warning("a warning")
    """
    said = {
        setting: run(code, TORCH_LOGS=setting).stderr for setting in ("fxopt", "+fxopt", "-fxopt", "dynamo")
    }
    heard = {
        setting: [text for text in ("a detail", "a fact", "a warning") if text in stderr]
        for setting, stderr in said.items()
    }
    assert heard == {
        "fxopt": ["a fact", "a warning"],
        "+fxopt": ["a detail", "a fact", "a warning"],
        "-fxopt": [],
        "dynamo": ["a warning"],
    }
