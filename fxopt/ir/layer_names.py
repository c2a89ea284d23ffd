"""Which module an input of a graph belongs to, by where Dynamo found it."""

from __future__ import annotations

import re

from torch import fx


def layer_name(placeholder: fx.Node) -> str:
    """The name of the module that holds a parameter or buffer, with dots; or the input's own name."""
    source = getattr(placeholder, "_dynamo_source", None)
    text = getattr(source, "name", "")
    text = text() if callable(text) else text
    return ".".join(re.findall(r"_modules\['([^']+)'\]", text)) or placeholder.name
