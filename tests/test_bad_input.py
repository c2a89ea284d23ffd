"""What users should not, or seldom do: a clear error, or eager's answer; never a fault inside of fxopt."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from fxopt.errors import OptionTypeError, OptionValueError, UnknownOption, UnsupportedMode, UserError
from fxopt.report.record import GraphRecord, collect

NAN, INF = float("nan"), float("inf")
Case = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]


def attend(q: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ q.transpose(-1, -2) * 0.5, -1) @ q


def norms(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rms = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    centred = x - x.mean(-1, keepdim=True)
    return rms, centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6), x * 1.0 + 0


class PlainSubclass(torch.Tensor):
    """Dispatches as torch.Tensor does."""


def complex_numbers() -> torch.Tensor:
    return torch.complex(torch.arange(4.0), torch.arange(4.0, 8.0)).view(2, 2)


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.arange(4.0), 0.1, 0, torch.quint8)


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)


# Name -> (function, its inputs): eager has an answer, and the compiled function must have the same one.
ANSWERED: dict[str, Case] = {
    "complex": (lambda x: (x * (1 + 2j)).abs() + (x @ x.mH).real, lambda: (complex_numbers(),)),
    "complex softmax-like": (
        lambda x: x.exp() / x.exp().sum(-1, keepdim=True) @ x,
        lambda: (complex_numbers(),),
    ),
    "conjugated input": (lambda x: x * 2.0, lambda: (complex_numbers().conj(),)),
    "negative bit": (lambda x: x * 2.0, lambda: (complex_numbers().conj().imag,)),
    "quantized": (lambda x: x.dequantize() * 2.0, lambda: (quantized(),)),
    "quantized inside": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize() * 1.0,
        lambda: (torch.arange(4.0),),
    ),
    "float8": (lambda x: x.to(torch.float32) * 1.0, lambda: (torch.ones(4).to(torch.float8_e4m3fn),)),
    "to float8": (lambda x: (x * 1.0).to(torch.float8_e5m2).float(), lambda: (torch.arange(4.0),)),
    "float16 overflow": (lambda x: x * 1.0 + 60000.0, lambda: (torch.full((4,), 60000.0).half(),)),
    "integers": (lambda x: (x // 3 + x % 2) * 1 + 0, lambda: (torch.arange(-5, 5),)),
    "integer matmul": (lambda x: x @ x * 1, lambda: (torch.arange(9).view(3, 3),)),
    "uint16": (lambda x: x.to(torch.int32) + 0, lambda: (torch.arange(5).to(torch.uint16),)),
    "bool": (lambda x: x & ~x | True, lambda: (torch.tensor([True, False]),)),
    "bits": (lambda x: x.view(torch.int32) * 1, lambda: (torch.ones(4),)),
    "empty batch": (attend, lambda: (torch.ones(0, 2, 3, 4),)),
    "empty sequence": (attend, lambda: (torch.ones(2, 2, 0, 4),)),
    "empty features": (norms, lambda: (torch.ones(3, 0),)),
    "0-d": (lambda x: (x * 2.0 + 1.0).sin() * 1.0, lambda: (torch.tensor(3.0),)),
    "0-d softmax": (lambda x: torch.softmax(x * 2.0, -1), lambda: (torch.tensor(3.0),)),
    "0-d norms": (norms, lambda: (torch.tensor(3.0),)),
    "eight dimensions": (lambda x: x.sum((0, 5)) * 1.0, lambda: (torch.ones([1, 2] * 4),)),
    "sparse": (
        lambda x, y: torch.sparse.mm(x, y) * 1.0,
        lambda: (torch.eye(3).to_sparse(), torch.ones(3, 3)),
    ),
    "sparse csr": (lambda x, y: x @ y, lambda: (torch.eye(3).to_sparse_csr(), torch.ones(3, 3))),
    "sparse inside": (lambda x: x.to_sparse().to_dense() * 1.0, lambda: (torch.eye(3),)),
    "sparse output": (lambda x: (x * 1.0).to_sparse(), lambda: (torch.eye(3),)),
    "mkldnn": (lambda x: x.to_dense() * 1.0, lambda: (torch.ones(3, 3).to_mkldnn(),)),
    "jagged": (lambda x: x * 2.0, lambda: (jagged(),)),
    "wrapper subclass": (lambda x: x.sin() * 1.0, lambda: (TwoTensor(torch.ones(3), torch.zeros(3)),)),
    "plain subclass": (lambda x: x.sin() * 1.0, lambda: (torch.ones(3).as_subclass(PlainSubclass),)),
    "nan and inf": (norms, lambda: (torch.tensor([[1.0, NAN, INF], [-INF, 0.0, 1.0]]),)),
    "attention of nan and inf": (attend, lambda: (torch.tensor([[[[1.0, NAN], [INF, 0.0], [0.0, 1.0]]]]),)),
    "large floats": (lambda x: x * 1e300 * 1e300, lambda: (torch.ones(3),)),
    "large doubles": (lambda x: x * 1e300 * 1e10 - 1e308, lambda: (torch.ones(3, dtype=torch.float64),)),
    "large integer": (lambda x: x + 2**62, lambda: (torch.arange(3),)),
    "wrapping integer": (lambda x: x * 2**62 + 2**62, lambda: (torch.arange(5),)),
    "tiny numbers": (lambda x: x * 1e-45 * 1.0, lambda: (torch.ones(3),)),
    "negative zero": (lambda x: 1.0 / (x * 1.0 + 0), lambda: (torch.tensor([-0.0, 0.0]),)),
    "nan argument": (lambda x, s: x * s, lambda: (torch.ones(2), NAN)),
    "infinite argument": (lambda x, s: x * s, lambda: (torch.ones(2), INF)),
    "complex argument": (lambda x, s: x * s, lambda: (torch.ones(2), 2 + 1j)),
    "text and None": (lambda x, s, m: x * len(s) if m is None else x, lambda: (torch.ones(2), "abc", None)),
    "no tensor": (lambda n: torch.ones(n) * 2.0, lambda: (3,)),
    "no input": (lambda: torch.arange(3) * 2.0, lambda: ()),
    "overlapping input": (lambda x: x.sum(0) * 1.0, lambda: (torch.arange(10.0).as_strided((4, 4), (2, 1)),)),
    "expanded input": (lambda x: x * 2.0, lambda: (torch.ones(3, 1).expand(3, 4),)),
    "other outputs": (
        lambda x: {"y": x * 1.0, "n": None, "i": x.shape[0]},
        lambda: (torch.ones(4),),
    ),
    "input returned": (lambda x: (x, x * 1.0), lambda: (torch.ones(4),)),
    ".data": (lambda x: x.data.add_(1.0) + x.detach(), lambda: (torch.ones(4),)),
    "resize_": (lambda x: x.clone().resize_(2) * 2.0, lambda: (torch.ones(4),)),
    "set_": (lambda x, y: x.clone().set_(y) * 2.0, lambda: (torch.ones(3), torch.zeros(3))),
    "branch on data": (lambda x: x * 2.0 if x.sum() > 0 else x - 1.0, lambda: (torch.ones(4),)),
    "loop on data": (lambda x: sum(x * i for i in range(int(x.sum()))), lambda: (torch.ones(3),)),
    "sizes from data": (lambda x: x.nonzero() + x[x > 0].sum() * 1, lambda: (torch.tensor([0, 1, 2]),)),
}
# Not those in which Inductor alone does not give the answer of eager either: mkldnn, the negative bit, sparse
# outputs, strides of `nonzero`, products of infinities.
ON_INDUCTOR = [
    "complex",
    "conjugated input",
    "quantized",
    "float8",
    "empty batch",
    "0-d norms",
    "sparse",
    "jagged",
    "wrapper subclass",
    "nan and inf",
    "no input",
    "overlapping input",
    "branch on data",
]


def compiled_answer(case: Case, host: str) -> tuple[Any, Any, list[GraphRecord]]:
    function, inputs = case
    torch._dynamo.reset()
    with warnings.catch_warnings(), collect() as records:
        warnings.simplefilter("ignore")  # torch's: sparse tensors in beta, complex numbers in Inductor
        want = function(*inputs())
        got = torch.compile(function, backend="fxopt", options={"host": host, "strict": True})(*inputs())
    return want, got, records


def comparable(value: Any) -> Any:
    """Plain dense tensors: what is compared of nested and wrapped ones is their parts."""
    if isinstance(value, TwoTensor):
        return [value.a, value.b]
    if isinstance(value, torch.Tensor) and value.is_nested:
        return list(value.unbind())
    return value


@pytest.mark.parametrize("name", ANSWERED)
def test_the_answer_is_eagers(name: str) -> None:
    want, got, records = compiled_answer(ANSWERED[name], "eager")
    assert type(got) is type(want)
    torch.testing.assert_close(comparable(got), comparable(want), equal_nan=True)
    assert [record.failures for record in records] == [[]] * len(records)
    assert all(record.normalized or record.refusals for record in records)
    assert not [entry for record in records for entry in record.evidence if entry.status == "error"]


@pytest.mark.parametrize("name", ON_INDUCTOR)
def test_the_answer_is_eagers_on_inductor(name: str) -> None:
    want, got, records = compiled_answer(ANSWERED[name], "inductor")
    torch.testing.assert_close(comparable(got), comparable(want), equal_nan=True)
    assert [record.failures for record in records] == [[]] * len(records)


@pytest.mark.parametrize("host", ["eager", "inductor"])
def test_meta_tensors_have_eagers_metadata(host: str) -> None:
    case = attend, lambda: (torch.empty(2, 3, 4, 8, device="meta"),)
    want, got, records = compiled_answer(case, host)
    assert (got.shape, got.stride(), got.dtype, got.device) == (
        want.shape,
        want.stride(),
        want.dtype,
        want.device,
    )
    assert records[0].normalized


def plus_one_in_place(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1.0) * 2.0


@pytest.mark.parametrize("part", [lambda c: c.conj(), lambda c: c.conj().imag, lambda c: c, lambda c: c.imag])
def test_lazy_conjugates_and_negatives_on_the_automatic_host(part: Callable[..., Any]) -> None:
    """Inductor alone ignores the bits."""
    compiled = torch.compile(plus_one_in_place, backend="fxopt")
    mine, theirs = complex_numbers(), complex_numbers()
    assert torch.equal(compiled(part(mine)), plus_one_in_place(part(theirs)))
    assert torch.equal(mine, theirs)


REFUSED = {
    "conjugated input": "conjugate",
    "negative bit": "negative",
    "jagged": "subclass NestedTensor",
    "wrapper subclass": "subclass TwoTensor",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_to_the_host_says_why(name: str) -> None:
    _, _, records = compiled_answer(ANSWERED[name], "eager")
    ((stage, reason),) = records[0].refusals
    assert stage == "normalize"
    assert REFUSED[name] in reason
    assert not records[0].normalized


# Name -> (function, its inputs): eager raises.
RAISES: dict[str, Case] = {
    "shapes that do not fit": (lambda x: x @ x, lambda: (torch.ones(3, 4),)),
    "index out of range": (lambda x: x[5] * 2.0, lambda: (torch.ones(3),)),
    "dtypes that do not fit": (lambda x, y: x @ y, lambda: (torch.ones(3, 3), torch.ones(3, 3).double())),
    "integer too big": (lambda x, n: x * n, lambda: (torch.ones(3), 2**70)),
    "no such dimension": (lambda x: torch.softmax(x, 3), lambda: (torch.ones(3),)),
    "in-place on an expanded input": (lambda x: x.add_(1.0), lambda: (torch.ones(3, 1).expand(3, 4),)),
    "index out of range in data": (
        lambda x, i: nn.functional.embedding(i, x) * 1.0,
        lambda: (torch.ones(3, 2), torch.tensor([7])),
    ),
    "the user's own": (lambda x: [][x.shape[0]], lambda: (torch.ones(3),)),
}


@pytest.mark.parametrize("name", RAISES)
def test_the_users_error_is_the_one_of_torch_compile(name: str) -> None:
    """No error becomes an answer, and none looks like one of fxopt."""
    function, inputs = RAISES[name]
    with pytest.raises(Exception):  # noqa: B017 - whichever it is
        function(*inputs())
    errors: list[BaseException] = []
    for keywords in ({"backend": "eager"}, {"backend": "fxopt", "options": {"host": "eager"}}):
        torch._dynamo.reset()
        with collect() as records, pytest.raises(Exception) as caught:  # noqa: B017
            torch.compile(function, **keywords)(*inputs())
        errors.append(caught.value)
    assert type(errors[1]) is type(errors[0])
    assert "fxopt" not in str(errors[1])
    assert [record.failures for record in records] == [[]] * len(records)


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"options": {"hosts": "eager"}}, UnknownOption, "'host"),
        ({"options": {"": 1}}, UnknownOption, "unknown option"),
        ({"options": {"host": 3}}, OptionTypeError, "wants a string"),
        ({"options": {"strict": "yes"}}, OptionTypeError, "wants a bool"),
        ({"options": {"fuel": 1.5}}, OptionTypeError, "wants an integer"),
        ({"options": {"host": "cuda"}}, OptionValueError, "inductor, eager"),
        ({"options": {"fuel": -1}}, OptionValueError, "from 0 on"),
        ({"options": {"disable": ["fuse-norm"]}}, OptionValueError, "fuse-"),
        ({"mode": "fast"}, UnsupportedMode, "reduce-overhead"),
    ],
)
def test_options_are_refused_by_torch_compile_itself(
    keywords: dict[str, Any], error: type[UserError], text: str
) -> None:
    with collect() as records, pytest.raises(error, match=text):
        torch.compile(attend, backend="fxopt", **keywords)
    assert records == []


def test_mode_and_options_together_are_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="mode or options"):
        torch.compile(attend, backend="fxopt", mode="default", options={"host": "eager"})


def test_a_model_of_another_dtype_than_its_input() -> None:
    model = nn.Linear(3, 3).double()
    compiled = torch.compile(model, backend="fxopt", options={"host": "eager"})
    with pytest.raises(Exception, match="dtype"):
        compiled(torch.ones(2, 3))
    assert torch.equal(compiled(torch.ones(2, 3).double()), model(torch.ones(2, 3).double()))


def test_after_an_error_the_next_call_works() -> None:
    compiled = torch.compile(attend, backend="fxopt", options={"host": "eager"})
    with pytest.raises(Exception, match="[Dd]im"):
        compiled(torch.ones(()))
    q = torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(compiled(q), attend(q))
