"""``fxopt::shift_window``: a window over the last entries moves on, in place.

What the cache of a sliding layer does with each token: ``window = cat([window[width:], new])`` along `dim`.
One pass over the memory of the window, without another tensor of its size.

    window  contiguous; written
    new     broadcastable to the last `width` entries, which become `new`
"""

from __future__ import annotations

import torch

from fxopt.ir.ops.op import define_op

SCHEMA = "shift_window(Tensor(a!) window, Tensor new, int dim, int width) -> ()"


def shift_window(window: torch.Tensor, new: torch.Tensor, dim: int, width: int) -> None:
    """On the CPU. `new` shares no memory with `window`."""
    # numpy moves memory onto itself, from the front to the back. Entries that pass over an end of `dim` fall
    # on those that are written next.
    memory = window.detach().view(-1).view(torch.uint8).numpy()
    moved = width * window.stride(dim) * window.element_size()
    memory[:-moved] = memory[moved:]
    window.narrow(dim, window.shape[dim] - width, width).copy_(new)


def _fake(window: torch.Tensor, new: torch.Tensor, dim: int, width: int) -> None:
    return None


def register(library: torch.library.Library) -> None:
    """Make the op known to torch's dispatcher."""
    define_op(library, SCHEMA, shift_window, _fake, "CPU")
