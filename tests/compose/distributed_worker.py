"""One process of a group of two: trains a model, wrapped and compiled in some ways, and writes what came out.

    python distributed_worker.py RANK FOLDER

FOLDER holds `job.pt`: the model, the inputs of each process, the number and rate of the steps, and the ways:
pairs of wrapping and host. The result goes to `result_RANK.pt`.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fxopt.report.record import collect
from support.compiled import compile_fxopt, faults
from support.runs import train

# A process that waits for the other one longer than this will wait forever.
TIMEOUT = timedelta(seconds=60)
# DDP's buckets, in MiB: a tenth of the model. Its first bucket is of a fixed size, larger than that.
BUCKET = 0.02
FIRST_BUCKET = "_DEFAULT_FIRST_BUCKET_BYTES"

# Wraps a model; returns what to call. The second argument compiles, or does nothing in the eager run.
Wrapping = Callable[[torch.nn.Module, Callable[..., Any]], Callable[..., Any]]


def ddp_inside(model: torch.nn.Module, compiler: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo gives each bucket's part of the graph to the backend on its own."""
    wrapped = DistributedDataParallel(model, bucket_cap_mb=BUCKET)
    return compiler(wrapped)


def ddp_outside(model: torch.nn.Module, compiler: Callable[..., Any]) -> Callable[..., Any]:
    return DistributedDataParallel(compiler(model), bucket_cap_mb=BUCKET)


def fsdp_whole(model: Any, compiler: Callable[..., Any]) -> Callable[..., Any]:
    for layer in model.model.layers:
        fully_shard(layer)
    return compiler(fully_shard(model))


def fsdp_layers(model: Any, compiler: Callable[..., Any]) -> Callable[..., Any]:
    """Each layer compiled, then sharded."""
    for layer in model.model.layers:
        layer.forward = compiler(layer.forward)
        fully_shard(layer)
    wrapped: Callable[..., Any] = fully_shard(model)
    return wrapped


WRAPPINGS: dict[str, Wrapping] = {
    "ddp_inside": ddp_inside,
    "ddp_outside": ddp_outside,
    "fsdp_whole": fsdp_whole,
    "fsdp_layers": fsdp_layers,
}


class Training:
    """The same steps of gradient descent for each way."""

    def __init__(self, job: dict[str, Any], rank: int) -> None:
        self.model: torch.nn.Module = job["model"]
        self.inputs: dict[str, Any] = job["inputs"][rank]
        self.steps: int = job["steps"]
        self.rate: float = job["rate"]

    def eager(self, wrapping: Wrapping) -> list[dict[str, Any]]:
        model = copy.deepcopy(self.model)
        return self.run(wrapping(model, lambda function: function), model)

    def compiled(self, wrapping: Wrapping, host: str) -> dict[str, Any]:
        torch._dynamo.reset()
        model = copy.deepcopy(self.model)
        with collect() as records:
            results = self.run(wrapping(model, lambda function: compile_fxopt(function, host)), model)
        applied = Counter(entry.rewrite for record in records for entry in record.applied())
        return {"results": results, "faults": faults(records), "applied": applied}

    def run(self, call: Callable[..., Any], model: torch.nn.Module) -> list[dict[str, Any]]:
        """The loss, the logits and the whole gradients of each step."""
        results = []
        for _ in range(self.steps):
            result = train(call, model, self.inputs)
            gradients = result["gradients"]
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.sub_(gradients[name], alpha=self.rate)
            results.append(
                {
                    "loss": result["loss"].detach(),
                    "logits": result["output"].logits.detach(),
                    "gradients": {name: whole(gradient) for name, gradient in gradients.items()},
                }
            )
        return results


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    setattr(dist, FIRST_BUCKET, int(BUCKET * 2**20))
    job = torch.load(folder / "job.pt", weights_only=False)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=len(job["inputs"]),
        timeout=TIMEOUT,
    )
    training = Training(job, rank)
    found = {}
    for name, host in job["ways"]:
        wrapping = WRAPPINGS[name]
        found[name, host] = {
            "eager": training.eager(wrapping),
            "fxopt": training.compiled(wrapping, host),
        }
    torch.save(found, folder / f"result_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
