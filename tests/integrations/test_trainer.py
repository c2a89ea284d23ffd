"""Unmodified training scripts, with fxopt chosen by a flag, an environment variable or `accelerate launch`.

Each run is a process of its own that writes its losses and its trained weights; both are judged against the
same script run eagerly and in float64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from support.numerics import assert_closer

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "scripts"
PYTHON = [sys.executable]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
# Runs a script with every dtype that it or its libraries name read as float64.
IN_FLOAT64 = (
    "import runpy, sys\n"
    "from support.reference import reference_mode\n"
    "sys.argv = sys.argv[1:]\n"
    "with reference_mode():\n"
    "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
)
TRAINER_SETTINGS = [
    "--max_steps=3",
    "--per_device_train_batch_size=4",
    "--optim=sgd",
    "--learning_rate=0.5",
    "--logging_steps=1",
    "--save_strategy=no",
    "--report_to=none",
    "--use_cpu",
]


class Workplace:
    """A tiny model on disk, and the runs that train it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        LlamaForCausalLM(config).save_pretrained(self.model)

    def run(
        self, name: str, script: str, *flags: str, command: list[str] = PYTHON, **environ: str
    ) -> dict[str, Any]:
        """Losses and trained weights of `command scripts/<script> <flags>`."""
        output = self.folder / name
        settings = TRAINER_SETTINGS if script == "train.py" else []
        arguments = [f"--model_name_or_path={self.model}", f"--output_dir={output}", *settings, *flags]
        done = subprocess.run(
            [*command, str(SCRIPTS / script), *arguments],
            env={**clean_environment(), "FXOPT_DUMP": str(self.stages(name)), **environ},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        weights = load_file(output / "model.safetensors")
        (dtype,) = {weight.dtype for weight in weights.values()}
        losses = torch.tensor([entry["loss"] for entry in history if "loss" in entry], dtype=dtype)
        assert losses.shape == (3,)
        return {"losses": losses, "weights": weights}

    def stages(self, name: str) -> Path:
        """Where fxopt writes its stages in that run, if it runs at all."""
        return self.folder / f"{name}-stages"

    def compiled_by_fxopt(self, name: str) -> int:
        return len(list(self.stages(name).glob("**/*normalized.py")))


def clean_environment() -> dict[str, str]:
    """Nothing chosen from outside; faults of fxopt raise, and the host is the one without a compiler."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FXOPT_"))}
    paths = os.pathsep.join([str(HERE.parent), kept.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return kept | {"FXOPT_STRICT": "1", "FXOPT_HOST": "eager", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("trainer"))


class Judge:
    """Compares a run of a script with the same script in eager and in float64."""

    def __init__(self, workplace: Workplace, script: str) -> None:
        name = script.removesuffix(".py")
        self.eager = workplace.run(f"{name}-eager", script)
        assert workplace.compiled_by_fxopt(f"{name}-eager") == 0
        self.exact = workplace.run(
            f"{name}-float64", script, "--dtype=float64", command=[sys.executable, "-c", IN_FLOAT64]
        )

    def __call__(self, result: dict[str, Any]) -> None:
        assert_closer(self.exact, result, self.eager)


@pytest.fixture(scope="module")
def judge_trainer(workplace: Workplace) -> Judge:
    return Judge(workplace, "train.py")


@pytest.fixture(scope="module")
def judge_loop(workplace: Workplace) -> Judge:
    return Judge(workplace, "loop.py")


def test_script_does_not_mention_fxopt() -> None:
    assert [path.name for path in SCRIPTS.glob("*.py") if "fxopt" in path.read_text().lower()] == []


def test_training_changes_the_weights(workplace: Workplace, judge_trainer: Judge) -> None:
    """Else the comparisons below would compare nothing but the model that was loaded."""
    before = load_file(workplace.model / "model.safetensors")
    after = judge_trainer.eager["weights"]
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.allclose(before[name], after[name], rtol=1e-5)]


def test_trainer_flag(workplace: Workplace, judge_trainer: Judge) -> None:
    """With the default host, which is what a user gets."""
    judge_trainer(workplace.run("flag", "train.py", "--torch_compile_backend=fxopt", FXOPT_HOST="auto"))
    assert workplace.compiled_by_fxopt("flag") > 0


def test_trainer_flag_and_mode(workplace: Workplace, judge_trainer: Judge) -> None:
    flags = ("--torch_compile", "--torch_compile_backend=fxopt", "--torch_compile_mode=max-autotune")
    judge_trainer(workplace.run("mode", "train.py", *flags))
    assert workplace.compiled_by_fxopt("mode") > 0


def test_environment_variable(workplace: Workplace, judge_trainer: Judge) -> None:
    judge_trainer(workplace.run("environment", "train.py", ACCELERATE_DYNAMO_BACKEND="fxopt"))
    assert workplace.compiled_by_fxopt("environment") > 0


def test_accelerate_launch(workplace: Workplace, judge_trainer: Judge) -> None:
    command = [*LAUNCH, "--dynamo_backend=fxopt"]
    judge_trainer(workplace.run("launch", "train.py", command=command))
    assert workplace.compiled_by_fxopt("launch") > 0


CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
num_processes: 1
use_cpu: true
"""


def test_accelerate_config_file_and_regional_compilation(workplace: Workplace, judge_loop: Judge) -> None:
    """With regional compilation each block is compiled by itself: more graphs than the whole model is."""
    graphs = {}
    for name, line in (("whole", ""), ("regional", "  dynamo_use_regional_compilation: true\n")):
        config = workplace.folder / f"{name}.yaml"
        config.write_text(f"{CONFIG}dynamo_config:\n  dynamo_backend: FXOPT\n{line}")
        command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}"]
        judge_loop(workplace.run(name, "loop.py", command=command))
        graphs[name] = workplace.compiled_by_fxopt(name)
    assert graphs["regional"] > graphs["whole"] > 0


def test_accelerate_config_file_of_old(tmp_path: Path) -> None:
    """Config files written before `dynamo_config` existed name the backend at the top."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = tmp_path / "old.yaml"
    config.write_text(f"{CONFIG}dynamo_backend: FXOPT\n")
    assert load_config_from_file(str(config)).dynamo_config == {"dynamo_backend": "FXOPT"}
