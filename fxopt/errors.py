"""One class per error. The message is a class attribute, its fields are filled in at construction.

What fxopt cannot *optimise* is never an error, it is evidence; errors are for what the user can put right
(`UserError`) and for faults of fxopt itself (`InternalError`), so that the two never look alike.
"""

from __future__ import annotations


class FxoptError(Exception):
    """Base of all errors raised by fxopt. `message` is a format string; keyword arguments are its fields."""

    message = "{detail}"

    def __init__(self, *, location: str | None = None, **fields: object) -> None:
        self.fields = fields
        self.location = location
        text = self.message.format(**fields)
        super().__init__(f"{text}\n  at {location}" if location else text)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.location, self.fields)


def _rebuild(kind: type[FxoptError], location: str | None, fields: dict[str, object]) -> FxoptError:
    return kind(location=location, **fields)


class UserError(FxoptError):
    """Something that the caller can put right."""


class UnknownOption(UserError, KeyError):
    """An option that neither fxopt nor the host knows. `nearest` is a sentence, or empty."""

    message = "unknown option {name!r}.{nearest} All fxopt options: {known}."

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class OptionTypeError(UserError, TypeError):
    """An option with a value of the wrong type."""

    message = "{name} wants {wanted}, got {value!r} ({kind})."


class OptionValueError(UserError, ValueError):
    """An option whose value is of the right type but not one of the valid ones. `name` says where."""

    message = "{name} has no value {value!r}.{nearest} Valid: {valid}."


class UnsupportedMode(UserError, ValueError):
    """A `mode=` that torch.compile does not define."""

    message = "mode {mode!r} is not supported.{nearest} Valid modes: {valid}."


class UnsupportedTarget(UserError, ValueError):
    """A GPU that kernels cannot be compiled for. `reason` completes the sentence "target ... "."""

    message = "target {target!r} {reason}. Targets: {valid}."


class NotAModel(UserError, TypeError):
    """Something that cannot be compiled in the place of a model."""

    message = "wanted a module or a function, got {value!r} ({kind})."


class NotAModule(UserError, TypeError):
    """Something in the place of a model whose layers or weights are meant."""

    message = "wanted a torch.nn.Module, got {value!r} ({kind})."


class CannotGenerate(UserError, TypeError):
    """A model without `generate`, where one with it is needed."""

    message = "wanted a model with a method `generate`, compiled with fxopt, got {kind}."


class NoHost(UserError, RuntimeError):
    """The requested host compiler cannot run on this machine."""

    message = (
        "host {host!r} cannot be used here: {reason}. {remedy} "
        "Or pass options={{'host': 'eager'}} to run fxopt's rewrites without a host compiler."
    )


class CannotCompile(FxoptError, RuntimeError):
    """An emitted kernel that Triton or its assembler refuses: a fault of fxopt, or of the target's tools."""

    message = "kernel {kernel} cannot be compiled for {target}: {detail}\nIts file: {file}"


class KernelTooLarge(FxoptError, RuntimeError):
    """A kernel that was compiled and asks for more than its target has, or spills."""

    message = "kernel {kernel} does not fit {target}: {problems}.\nIts file: {file}"


class InternalError(FxoptError, RuntimeError):
    """A fault of fxopt itself, raised only with `strict=True`; otherwise it becomes evidence."""

    message = (
        "internal error in {stage}: {kind}: {detail}. This is a bug in fxopt, not in your model. "
        "Without options={{'strict': True}} the graph is compiled by the host, unchanged."
    )


class FormulaDiffers(FxoptError, RuntimeError):
    """A mask that was recovered as a formula says something else than its tensor: a fault of fxopt."""

    message = (
        "the mask was recovered as {formula}, but {found}. This is a bug in fxopt, please report it; "
        "options={{'disable': 'recover-mask'}} avoids it."
    )
