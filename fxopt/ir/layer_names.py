"""Which module an input of a graph belongs to, by where Dynamo found it."""

from __future__ import annotations

import re

from torch import fx


def layer_name(placeholder: fx.Node) -> str:
    """The name of the module that holds a parameter or buffer, with dots; or the input's own name."""
    return ".".join(re.findall(r"_modules\['([^']+)'\]", _source(placeholder))) or placeholder.name


def parameter_name(placeholder: fx.Node) -> str:
    """The name of a parameter itself, as `named_parameters` has it; or the input's own name."""
    own = re.findall(r"_parameters\['([^']+)'\]", _source(placeholder))
    module = re.findall(r"_modules\['([^']+)'\]", _source(placeholder))
    return ".".join([*module, *own]) or placeholder.name


def _source(placeholder: fx.Node) -> str:
    name = getattr(getattr(placeholder, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)
