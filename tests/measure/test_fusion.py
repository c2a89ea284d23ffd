"""The table of launches and bytes: what is counted in generated code, and the page."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.fusion import PAGE, RESULTS, _per_layer
from benchmarks.fusion_count import _launches
from benchmarks.fusion_page import GREEN, RED, cells, render

CODE = """
triton_before = async_compile.triton('triton_before', '''
    other.run(not_code)
''')
async_compile.wait(globals())
def call(args):
    with torch.cuda._DeviceGuard(0):
        triton_poi_fused_0.run(arg0_1, buf0, 64, stream=raw_stream0)
        extern_kernels.mm(buf0, arg1_1, out=buf1)
        fused_softmax_12.run(buf1, buf2, 8, 1, 1, stream=raw_stream0)
        # Topologically Sorted Source Nodes: [x], Original ATen: torch.ops.aten.mm
        buf3 = torch.ops.aten._scaled_dot_product_flash_attention.default(buf2, buf2, buf2)
        buf4 = buf3[0]
        assert_size_stride(buf4, (1, 2), (2, 1), 'torch.ops.aten._scaled_dot_product_flash_attention.default')
        buf5 = extern_kernels.convolution(buf4, arg2_1)
"""


def test_launches_are_counted_by_kind() -> None:
    found = _launches(CODE, {"fused_softmax"})
    assert dict(found) == {"inductor": 1, "fxopt": 1, "products": 2, "other": 1}


def counted(launches: int, size: int) -> dict[str, Any]:
    return {"launches": {"inductor": launches}, "bytes": size}


def test_a_layer_is_a_difference_of_depths() -> None:
    found = _per_layer(counted(20, 1000), counted(50, 4000), (2, 12))
    assert found == {"launches": {"inductor": 3.0}, "bytes": 300.0}


def row(phase: str, theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return {"model": "llama", "phase": phase, "layers": 12, "inductor": theirs, "fxopt": ours}


def test_what_is_more_is_marked() -> None:
    fewer = cells(row("training", counted(20, 300), counted(19, 300)))
    assert not any(RED in cell for cell in fewer)
    assert sum(GREEN in cell for cell in fewer) == 2
    more = cells(row("training", counted(20, 300), counted(21, 301)))
    assert sum(RED in cell for cell in more) == 2
    above_the_goal = cells(row("decode", counted(20, 300), counted(9, 300)))
    assert sum(RED in cell for cell in above_the_goal) == 1


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text() == render(json.loads(RESULTS.read_text()))
