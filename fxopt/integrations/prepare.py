"""`fxopt.prepare`: linear layers of a model become quantized ones, and their dense weights are freed."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from fxopt.errors import OptionTypeError
from fxopt.integrations.adopt_modules import KEPT, adopt_modules
from fxopt.integrations.calibrate import Calibration
from fxopt.integrations.checkpoint_names import is_of_transformers
from fxopt.integrations.linear_modules import check_module, is_linear, plain_module
from fxopt.integrations.quantize_layer import (
    LayerFacts,
    dense_note,
    other_notes,
    quantized_layer,
    quantized_stack,
)
from fxopt.integrations.quantized_experts import QuantizedExperts, QuantizedStack, put_stack
from fxopt.integrations.quantized_module import QuantizedLinear
from fxopt.integrations.replaceable import keep_hooks
from fxopt.ir.linear_notes import DENSE, LinearNote
from fxopt.ir.quantization_policy import Scheme
from fxopt.ir.quantize import NotFinite
from fxopt.options import Options

Model = TypeVar("Model", bound=nn.Module)

# Where a prepared model keeps what became of its layers.
NOTES = "fxopt_linears"


@torch.no_grad()
def prepare(
    model: Model,
    quantize: str | Mapping[str, str | None] | None = None,
    *,
    group_size: int | None = None,
    skip: str | Sequence[str] = (),
    calibration: Calibration | None = None,
) -> Model:
    """Put `QuantizedLinear` in the place of linear layers, one by one; each dense weight is freed at once.

    Layers that a library has quantized keep their numbers, whatever `quantize` says.

    Args:
        model: changed in place. Compile it afterwards.
        quantize, group_size, skip: as ``options`` have them, see `fxopt.options.Options`.
        calibration: of `fxopt.calibrate`. Layers that it has seen are rounded such that their outputs for
            these inputs change least.

    Returns:
        `model`. ``model.fxopt_linears`` says what became of each linear layer; `print` shows it as a table.

    Raises:
        NotAModule: `model` is no module.
        OptionTypeError, OptionValueError: as for options.
        ValueError: the calibration was of layers of other widths.
    """
    check_module(model)
    _check_calibration(calibration)
    _prepare(plain_module(model), quantize, group_size, skip, calibration)
    return model


def _check_calibration(given: Any) -> None:
    if given is not None and not isinstance(given, Calibration):
        kind, wanted = type(given).__name__, "what fxopt.calibrate returns"
        raise OptionTypeError(name="calibration", wanted=wanted, value=reprlib.repr(given), kind=kind)


def _prepare(
    model: nn.Module, quantize: Any, group_size: Any, skip: Any, calibration: Calibration | None
) -> None:
    given = {"quantize": quantize, "group_size": group_size, "skip": skip}
    options = Options.parse(options=given, environ={})
    notes = adopt_modules(model)
    notes.extend(_earlier_notes(model, {note.name for note in notes}))
    known = {note.name for note in notes}
    names = [name for name, module in model.named_modules() if is_linear(module) and name not in known]
    about, shared = LayerFacts(model), _shared_modules(model)
    for name in names:
        module: Any = model.get_submodule(name)
        chosen = about.scheme(name, module, options)
        if isinstance(chosen, Scheme):
            notes.append(quantize_in_place(model, name, chosen, calibration))
            for other in shared.get(name, ()):
                replace(model, other, model.get_submodule(name))
        else:
            notes.append(dense_note(name, type(module).__name__, module.weight, chosen))
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedExperts):
            notes.extend(_quantize_experts(name, module, about.stack_schemes(name, module, options)))
    notes.extend(other_notes(model, (note.name for note in notes)))
    _warn_of_patterns(options, [note.name for note in notes])
    _warn_of_nothing(options, notes)
    setattr(model, NOTES, notes)
    _describe(model)


def _earlier_notes(model: nn.Module, known: set[str]) -> list[LinearNote]:
    """What an earlier call has quantized."""
    modules = dict(model.named_modules())
    earlier = [note for note in getattr(model, NOTES, ()) if note.name not in known]
    return [note for note in earlier if isinstance(modules.get(note.name), QuantizedLinear)]


def _shared_modules(model: nn.Module) -> dict[str, list[str]]:
    """Other names of linear layers that have several."""
    first: dict[int, str] = {}
    others: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_linear(module) and first.setdefault(id(module), name) != name:
            others.setdefault(first[id(module)], []).append(name)
    return others


def _warn_of_patterns(options: Options, names: Sequence[str]) -> None:
    """A pattern that fits no layer is a mistake in most cases, and nothing else would tell."""
    patterns = [*(pattern for pattern, _ in options.quantize), *options.skip]
    unused = [one for one in patterns if one != "*" and not any(fnmatchcase(name, one) for name in names)]
    if unused:
        listed = ", ".join(map(repr, unused))
        warnings.warn(f"fxopt.prepare: no linear layer has a name that fits {listed}", stacklevel=5)


def _warn_of_nothing(options: Options, notes: Sequence[LinearNote]) -> None:
    """Who asks for a small model without naming layers gets it back as it was: rarely what was meant."""
    if not options.quantize or not notes or any(note.route != DENSE for note in notes):
        return
    first = f"{notes[0].name}: {notes[0].reason}"
    warnings.warn(
        f"fxopt.prepare: none of {len(notes)} linear layers is quantized. {first}. "
        "print(model.fxopt_linears) has the reason for each.",
        stacklevel=5,
    )


def quantize_in_place(
    model: nn.Module, name: str, scheme: Scheme, calibration: Calibration | None = None
) -> LinearNote:
    """Replace the linear layer `name` of `model`, unless its weight cannot be quantized; says what it did."""
    module: Any = model.get_submodule(name)
    try:
        made, note = quantized_layer(name, module, scheme, calibration)
    except NotFinite as error:
        return dense_note(name, type(module).__name__, module.weight, str(error))
    replace(model, name, made)
    return note


def _quantize_experts(name: str, module: Any, chosen: Mapping[str, Scheme | str]) -> list[LinearNote]:
    """Replace the stacks of a module of experts, all or none."""
    kind = type(module).__name__
    reasons: dict[str, str] = {one: each for one, each in chosen.items() if isinstance(each, str)}
    made: dict[str, tuple[QuantizedStack, LinearNote]] = {}
    for one, scheme in chosen.items():
        if reasons or not isinstance(scheme, Scheme):
            break
        try:
            made[one] = quantized_stack(one, module, scheme)
        except NotFinite as error:
            reasons = dict.fromkeys(chosen, f"{one.rpartition('.')[2]}: {error}")
    if reasons:
        return [
            dense_note(one, kind, getattr(module, one.rpartition(".")[2]), reasons[one]) for one in chosen
        ]
    for one, (stack, _) in made.items():
        put_stack(module, one.rpartition(".")[2], stack)
    return [note for _, note in made.values()]


def _describe(model: Any) -> None:
    """Have the configuration of a model of transformers say what is quantized: it is saved with the model.

    A library's layers that were left as they are need what the library has put there.
    """
    if not is_of_transformers(model):
        return
    from fxopt.integrations.quantization_config import FxoptConfig

    notes = getattr(model, NOTES)
    if any(note.route == KEPT for note in notes) or not any(note.is_quantized for note in notes):
        return
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    model.config.quantization_config = FxoptConfig()
    model.config.quantization_config.describe(model)


def replace(model: nn.Module, name: str, made: nn.Module) -> None:
    """Put `made` in the place of the sub-module `name`, or of the stack of that name."""
    parent, _, own = name.rpartition(".")
    made.train(model.training)
    if isinstance(before := getattr(model.get_submodule(parent), own), nn.Module):
        keep_hooks(before, made)
    if isinstance(made, QuantizedStack):
        put_stack(model.get_submodule(parent), own, made)
    else:
        setattr(model.get_submodule(parent), own, made)
    # What was tied to an embedding is a weight of its own now: transformers would tie it again.
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    for target in [one for one, source in tied.items() if f"{name}.weight" in (one, source)]:
        del tied[target]
