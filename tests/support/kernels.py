"""Small kernels as files: what the tests of code generation compile, launch and break."""

from __future__ import annotations

from fxopt.codegen.kernel_file import About, Argument, KernelFile, Launch, Output, Parameter

TRITON_TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def add(dtype: str = "bfloat16", *, body: str = "x * 1.5 + y") -> KernelFile:
    """An elementwise kernel with a constant; `body` is what it computes."""
    pointer = TRITON_TYPES[dtype]
    return KernelFile(
        name="add_vectors",
        parameters=(Parameter("x"), Parameter("y")),
        jit=f"""
@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, {body}, mask=mask)
""",
        launches=(
            Launch(
                "_add_kernel",
                arguments=(
                    Argument("x_ptr", pointer),
                    Argument("y_ptr", pointer),
                    Argument("out_ptr", pointer),
                    Argument("n", "i32"),
                ),
                grid=("triton.cdiv(n, BLOCK)",),
                constants=(("BLOCK", 128),),
            ),
        ),
        outputs=(Output("out", ("n",), "x.dtype"),),
        reference="def reference(x, y):\n    return x * 1.5 + y",
        example_inputs=f"""
def example_inputs(device):
    return tuple(torch.randn(131, device=device).to(torch.{dtype}) for _ in range(2))
""",
        sizes=(("n", "x.numel()"),),
        about=About(
            summary="adds",
            lines=('model.py:7: return x * 1.5 + y  # """ \\',),
            replaces=("aten.mul.Tensor", "aten.add.Tensor"),
            shapes=("x: [131]", "y: [131]"),
            configuration=("BLOCK=128: the smallest",),
            moved="3 * n * x.element_size()",
            flops="2 * n",
        ),
    )


def softmax(dtype: str = "float32") -> KernelFile:
    """A row reduction over strided rows, computed in float32."""
    pointer = TRITON_TYPES[dtype]
    return KernelFile(
        name="softmax_rows",
        parameters=(Parameter("x"),),
        jit="""
@triton.jit
def _softmax_kernel(x_ptr, out_ptr, x_stride, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    x = tl.load(x_ptr + row * x_stride + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    numerator = tl.exp(x - tl.max(x, axis=0))
    softmax = numerator / tl.sum(numerator, axis=0)
    tl.store(out_ptr + row * columns + offsets, softmax.to(out_ptr.dtype.element_ty), mask=mask)
""",
        launches=(
            Launch(
                "_softmax_kernel",
                arguments=(
                    Argument("x_ptr", pointer),
                    Argument("out_ptr", pointer),
                    Argument("x_stride", "i32", "x.stride(0)"),
                    Argument("columns", "i32"),
                ),
                grid=("rows",),
                constants=(("BLOCK", 64),),
            ),
        ),
        outputs=(Output("out", ("rows", "columns"), "x.dtype"),),
        reference="def reference(x):\n    return torch.softmax(x, dim=-1)",
        example_inputs=f"""
def example_inputs(device):
    return (torch.randn(5, 100, device=device).to(torch.{dtype})[:, :37],)
""",
        sizes=(("rows", "x.shape[0]"), ("columns", "x.shape[1]")),
    )


def product() -> KernelFile:
    """A matrix product of one tile in bfloat16 with a bias that is added in bfloat16."""
    return KernelFile(
        name="product_of_tiles",
        parameters=(Parameter("a"), Parameter("b"), Parameter("bias")),
        jit="""
@triton.jit
def _product_kernel(a_ptr, b_ptr, bias_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tile = index[:, None] * SIZE + index[None, :]
    product = tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile)).to(tl.bfloat16)
    tl.store(out_ptr + tile, product + tl.load(bias_ptr + index)[None, :])
""",
        launches=(
            Launch(
                "_product_kernel",
                arguments=tuple(Argument(f"{name}_ptr", "*bf16") for name in ("a", "b", "bias", "out")),
                grid=("1",),
                constants=(("SIZE", 32),),
            ),
        ),
        outputs=(Output("out", ("32", "32"), "torch.bfloat16"),),
        reference="def reference(a, b, bias):\n    return a @ b + bias",
        example_inputs="""
def example_inputs(device):
    return tuple(torch.randn(shape, device=device).bfloat16() for shape in ((32, 32), (32, 32), (32,)))
""",
    )


def accumulate() -> KernelFile:
    """Two launches, two results, a number as parameter and an input that is written to."""
    scale = """
@triton.jit
def _scale_kernel(x_ptr, factor, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets) * factor)


@triton.jit
def _total_kernel(x_ptr, total_ptr, square_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(total_ptr, tl.sum(x, axis=0))
    tl.atomic_add(square_ptr, tl.sum(x * x, axis=0))
"""
    x, block = Argument("x_ptr", "*fp32"), (("BLOCK", 64),)
    totals = (x, Argument("total_ptr", "*fp32"), Argument("square_ptr", "*fp32"))
    return KernelFile(
        name="scale_and_total",
        parameters=(Parameter("x"), Parameter("factor", "float")),
        jit=scale,
        launches=(
            Launch("_scale_kernel", (x, Argument("factor", "fp32")), ("1",), block, num_warps=1),
            Launch("_total_kernel", totals, ("1",), block, num_warps=2, num_stages=1),
        ),
        outputs=(Output("total", (), "x.dtype"), Output("square", (), "x.dtype", fill="0")),
        reference="""
def reference(x, factor):
    x.mul_(factor)
    return x.sum(), (x * x).sum()
""",
        example_inputs="def example_inputs(device):\n    return torch.randn(64, device=device), 0.25",
        mutates=("x",),
    )
