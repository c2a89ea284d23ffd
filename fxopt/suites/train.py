"""Whole training steps, forward, backward and AdamW, by a loop of one's own and by the Hugging Face Trainer.

Every candidate trains a copy of the same model on the same batch. Liger's kernels are a candidate where they
are installed and know the model: inside of eager, as its users run them.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from fxopt.commands.targets import resolve
from fxopt.measure.accuracy import dashboard_passes
from fxopt.measure.compare import exact_result, faults_of, figures
from fxopt.measure.compiled import BASELINE, CANDIDATE, EAGER, TUNED, TWIN, how
from fxopt.measure.full_models import FULL
from fxopt.measure.jobs import Job
from fxopt.measure.memory import peak_bytes
from fxopt.measure.models import Subject
from fxopt.measure.quiet import quiet_transformers
from fxopt.measure.results import Row
from fxopt.measure.suite import release
from fxopt.measure.timing import interleave
from fxopt.report.record import collect
from fxopt.suites.plan import Plan, megabytes, milliseconds, over

LIGER = "liger"
TITLE = "time of a training step, inductor / fxopt: more than 1 means that fxopt is faster"
COLUMNS: dict[str, Callable[[Row], str]] = {
    "inductor ms": milliseconds(BASELINE),
    "fxopt ms": milliseconds(CANDIDATE),
    "over eager": over(EAGER),
    "over liger": over(LIGER),
    "MB": megabytes,
    "right": lambda row: {None: "-", True: "yes", False: "NO"}[row.get("dashboard")],
}
MODELS = ("llama", "bert", "t5")
LOOPS = ("loop", "trainer")
Step = Callable[[], Any]


def jobs(plan: Plan) -> list[Job]:
    """Two for each model: a loop, and the Trainer, which needs accelerate."""
    trained = tuple(name for name, model in FULL.items() if model.trained)
    names = plan.targets(trained if plan.size == "full" else MODELS)
    loops = LOOPS if importlib.util.find_spec("accelerate") is not None else LOOPS[:1]
    keys = [{"model": model, "by": by} for model in names for by in loops]
    return [Job(key, functools.partial(_measure, plan, **key)) for key in keys]


def _measure(plan: Plan, model: str, by: str) -> Row:
    subject = resolve(model, plan.request(training=True)).without_chance()
    exact = exact_result(subject) if plan.check else None
    release()
    names = [EAGER, BASELINE, CANDIDATE, *([TUNED] if plan.tuned else [])]
    names += [LIGER] if by == "loop" and _knows_liger(subject.model.config.model_type) else []
    make = _by_trainer if by == "trainer" else _by_loop
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), collect() as records:
        made = {name: make(plan, _copy(subject), name, folder) for name in names}
        answers = {name: answer() for name, (answer, _) in made.items()}
        steps: dict[str, Step] = {name: step for name, (_, step) in made.items()}
        peaks = {}
        for name, step in steps.items():
            step()
            peaks[name] = peak_bytes(step)
        times = interleave({**steps, TWIN: steps[BASELINE]}, budget_seconds=2 * plan.budget)
    right = None
    if exact is not None:
        right = dashboard_passes(answers[CANDIDATE], answers[EAGER], exact, training=True)
    release()
    return figures(times) | {"dashboard": right, "faults": faults_of(records), "peak_bytes": peaks}


def _copy(subject: Subject) -> Subject:
    model = copy.deepcopy(subject.model)
    return Subject(subject.name, model, subject.args, subject.kwargs, training=True)


def _by_loop(plan: Plan, subject: Subject, name: str, folder: str) -> tuple[Step, Step]:
    """The loss and gradients of the first step, and a whole step."""
    if name == LIGER:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=subject.model)
    call: Any = subject.model
    if name not in (EAGER, LIGER):
        call = torch.compile(subject.model, **how(name, mode=plan.mode, options=plan.options))
    optimizer = torch.optim.AdamW(subject.model.parameters(), lr=1e-5)
    backward = subject.step(call)

    def step() -> None:
        backward()
        optimizer.step()

    return subject.answering(backward), step


def _by_trainer(plan: Plan, subject: Subject, name: str, folder: str) -> tuple[Step, Step]:
    """`Trainer.training_step` and its optimizer, compiled by the Trainer's own flags."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    # The flag travels through these variables, and TrainingArguments never takes them back.
    for variable in [each for each in os.environ if each.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[variable]
    flags: dict[str, Any] = {}
    if name != EAGER:
        flags = {"torch_compile": True, "torch_compile_backend": BASELINE if name == TUNED else name}
        flags |= {"torch_compile_mode": how(TUNED)["mode"]} if name == TUNED else {}
    rows = next(value.shape[0] for value in subject.kwargs.values() if isinstance(value, torch.Tensor))
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=rows,
        optim="adamw_torch",
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        use_cpu=not plan.device.startswith("cuda"),
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        max_grad_norm=0.0,
        **flags,
    )
    items = [{key: value[row].cpu() for key, value in subject.kwargs.items()} for row in range(rows)]
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    trainer = Trainer(model=subject.model, args=arguments, train_dataset=items)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    subject.model.load_state_dict(before)

    def backward() -> Any:
        subject.model.zero_grad(set_to_none=True)
        return _Loss(trainer.training_step(trainer.model_wrapped, dict(subject.kwargs)))

    def step() -> None:
        backward()
        trainer.optimizer.step()

    return subject.answering(backward), step


class _Loss:
    """The Trainer returns the loss alone, detached."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


def _knows_liger(model_type: str) -> bool:
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return model_type in MODEL_TYPE_TO_APPLY_LIGER_FN
