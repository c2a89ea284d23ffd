"""A GPU that is believed in: torch traces and Inductor generates code for it, on a machine that has none.

Tensors are fakes: they have a device, shapes and strides, and no memory, so models may be of any width. For
processes of their own: `install` changes torch for good.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from fxopt.ir.target import Target

SOURCE = Path(__file__).with_suffix(".cpp")


@dataclass(frozen=True)
class Generated:
    """What Inductor generates for one graph.

    Attributes:
        code: the text of its wrapper and kernels.
        moved: what each piece of work moves in Inductor's own account: (name, bytes). The name of a Triton
            kernel that was in the graph already is its file, that of an op or product its class.
    """

    code: str
    moved: tuple[tuple[str, int], ...]


def install(name: str) -> Target:
    """Make torch believe in the GPU of that name. Before torch is imported: it asks once what there is.

    A build of torch with CUDA brings the device itself.
    """
    library = None if _has_cuda() else ctypes.CDLL(str(_library()))
    import torch
    from torch._dynamo.device_interface import CudaInterface
    from torch._subclasses import fake_tensor
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental import proxy_tensor

    from fxopt.ir.target import Target

    target = Target.named(name)
    if library is not None:
        ctypes.c_int.in_dll(library, "assumed_arch").value = target.arch
    torch.version.cuda = torch.version.cuda or "12.8"
    for key, answer in _answers(target).items():
        setattr(torch.cuda, key, answer)
        if hasattr(CudaInterface, key):
            setattr(CudaInterface, key, staticmethod(answer))
    # Constants are made on the CPU and then become fakes of the device; none is computed with while tracing.
    proxy_tensor.CONSTANT_NUMEL_LIMIT = -1
    fake_tensor.init_gpu_context = lambda device: None  # a build with CUDA would ask for the driver
    FakeTensorMode.avoid_device_init = property(lambda mode: True, lambda mode, value: None)
    _fold_constants_on_the_cpu()
    return target


def _answers(target: Target) -> dict[str, Callable[..., Any]]:
    """What functions of `torch.cuda` say of the target."""
    import torch

    properties = SimpleNamespace(
        name=target.card,
        major=target.arch // 10,
        minor=target.arch % 10,
        multi_processor_count=target.sms,
        total_memory=80 << 30,
        warp_size=target.warp_size,
        regs_per_multiprocessor=target.registers_per_sm,
        max_threads_per_multi_processor=target.threads_per_sm,
        max_threads_per_block=1024,
        shared_memory_per_block_optin=target.shared_per_block,
        shared_memory_per_multiprocessor=target.shared_per_sm,
        L2_cache_size=target.l2_bytes,
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
        "_lazy_init": lambda: None,
    }


def _fold_constants_on_the_cpu() -> None:
    """Inductor makes constants of the device to learn their values."""
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder as Folder
    from torch.utils._python_dispatch import TorchDispatchMode

    class OnCpu(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            return func(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))

    def on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with OnCpu():
                return method(*args, **kwargs)

        return run

    for name in ("__init__", "_deduce_value"):
        setattr(Folder, name, on_cpu(getattr(Folder, name)))


def _torch() -> Path:
    """Where torch is, without an import."""
    spec = find_spec("torch")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _has_cuda() -> bool:
    return (_torch() / "lib" / "libtorch_cuda.so").exists()


def _library() -> Path:
    """The compiled device, in a directory of temporary files."""
    torch = _torch()
    version = (torch / "version.py").read_text()
    # It finds torch's libraries where they were: another environment's may be gone.
    digest = hashlib.sha256(f"{SOURCE.read_text()}{version}{torch}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"assumed_gpu_{os.getuid()}_{digest}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}"]
        subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
        made.rename(library)
    return library


@contextmanager
def generated(target: Target) -> Iterator[list[Generated]]:
    """What Inductor generates code for meanwhile, graph by graph.

    What is compiled computes nothing: it returns new fakes of the shapes of its results.
    """
    import torch
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering

    from fxopt.codegen.compile import assumed_device

    found: list[Generated] = []

    def keep(self: Any) -> Any:
        code, _ = self.codegen()
        found.append(Generated(code.value, tuple(map(_moved, self.scheduler.nodes))))
        values = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in _results(self)]
        return SimpleNamespace(call=lambda given: _new(values), __file__="", key="", __name__="")

    settings = {"fx_graph_cache": False, "shape_padding": False, "triton.cudagraphs": False}
    # The layout of convolutions depends on the number of nodes: a deeper model would have another embedding.
    settings["layout_optimization"] = False
    with (
        assumed_device(target),
        patch.object(GraphLowering, "compile_to_module", keep),
        patch.object(compile_fx, "get_input_idxs_to_check", lambda *given: ()),
        config.patch(settings),
    ):
        yield found


def _moved(node: Any) -> tuple[str, int]:
    from torch._inductor.ir import UserDefinedTritonKernel

    name = type(getattr(node, "node", None) or node).__name__
    if isinstance(getattr(node, "node", None), UserDefinedTritonKernel):
        kernel, *_ = node.node.get_kernel_and_metadata()
        name = kernel.fn.__globals__["__file__"]
    return name, int(node.get_read_write_buffers_sizes())


def _results(lowering: Any) -> Any:
    (output,) = lowering.module.graph.find_nodes(op="output")
    return output.args[0]


def _new(values: list[Any]) -> tuple[Any, ...]:
    import torch

    return tuple(
        torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=one.device)
        if isinstance(one, torch.Tensor)
        else one
        for one in values
    )
