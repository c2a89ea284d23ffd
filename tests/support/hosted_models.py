"""Run as a program: models of the zoo, compiled for an assumed GPU where every kernel is found to be faster.

``python -m support.hosted_models sm_90 llama bert`` prints problems by model and phase as JSON. What Inductor
cannot compile alone has none of fxopt.
"""

from __future__ import annotations

import sys

from benchmarks.assumed_gpu import generated, install

TARGET = install(sys.argv[1])

import json  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Any  # noqa: E402
from unittest.mock import patch  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402

from fxopt.ir.contract import Status  # noqa: E402
from fxopt.report.record import collect  # noqa: E402
from support.made_up_timer import made_up  # noqa: E402
from support.zoo import ZOO  # noqa: E402


def compile_step(name: str, training: bool, backend: str, **options: Any) -> list[str]:
    """One step of a model; what went wrong on the way."""
    torch._dynamo.reset()
    architecture = ZOO[name]
    config = architecture.make_config()
    with generated(TARGET), collect() as records:
        with no_init_weights(), torch.device("cuda"):
            cls = getattr(transformers, architecture.model_class)
            model = cls._from_config(config, attn_implementation="eager", dtype=torch.bfloat16)
            inputs = architecture.make_inputs(training=training, dtype=torch.bfloat16)
        if hasattr(config, "use_cache"):  # the sizes of a window are copied to the GPU, which is not there
            inputs["use_cache"] = False
        model.train(training).compile(backend=backend, options=options or None)
        run_step(model, inputs, training)
    evidence = [each for record in records for each in record.evidence if each.status is Status.ERROR]
    return [str(each) for record in records for each in record.failures] + [each.reason for each in evidence]


def run_step(model: Any, inputs: dict[str, Any], training: bool) -> None:
    with torch.set_grad_enabled(training):
        made = model(**inputs)
    if training:
        values = (each for each in made.values() if isinstance(each, torch.Tensor) and each.requires_grad)
        sum(each.float().sum() for each in values).backward()


def problems(name: str, training: bool) -> list[str]:
    try:
        return compile_step(name, training, "fxopt", strict=True, tune_seconds=5.0, cache_dir=DIRECTORY)
    except Exception as error:
        try:
            compile_step(name, training, "inductor")
        except Exception:
            return []
        return [f"{type(error).__name__}: {error}"[:2000]]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        TemporaryDirectory() as DIRECTORY,
        patch("fxopt.codegen.timing.GpuTimer", made_up()),
        patch("fxopt.hosts.gpu_contest.GpuArena", made_up()),
    ):
        found = {
            f"{name} {'training' if training else 'inference'}": problems(name, training)
            for name in sys.argv[2:]
            for training in (False, True)
        }
    print(json.dumps({case: said for case, said in found.items() if said}))
