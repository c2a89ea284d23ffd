"""The kernels of many graphs, with sizes that are known and not, by name and hash: JSON on stdout."""

from __future__ import annotations

import json

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt.codegen.kernels import kernel_of
from fxopt.codegen.regions import partition
from fxopt.ir.ops import register_ops
from fxopt.ir.target import Target
from support.emitted import PROGRAMS
from support.emitted_products import layers

NAMES = ("mixed dtypes", "embedding and its norm", "rotate-half RoPE", "kernels that cross", "computed again")


def main() -> None:
    register_ops()
    target, devices = Target.named("sm_90"), frozenset({"cpu"})
    products = layers((1, 3), 64, 96, torch.bfloat16)
    graphs = {name: PROGRAMS[name] for name in NAMES} | {"gated": products["gated"]}
    found = []
    for name, (function, inputs) in graphs.items():
        for mode in ("fake", "symbolic"):
            gm = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode=mode)(*inputs)
            regions = partition(gm.graph, devices)
            found += [
                (name, mode, one.name, one.digest) for one in (kernel_of(r, target) for r in regions.regions)
            ]
            found += [(name, mode, node.name, reason) for node, reason in regions.refused]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
