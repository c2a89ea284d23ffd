"""Loops over the tensors of a step, in Python and in C++: both see the same differences."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import object_setattr_ignore_descriptor

from fxopt.runtime import step_loops
from fxopt.runtime.relied import _unchanged_dicts
from fxopt.runtime.step_loops import Current, Loops, PythonLoops


@pytest.fixture(params=["python", "c++"])
def loops(request: pytest.FixtureRequest) -> Loops:
    return PythonLoops() if request.param == "python" else step_loops._compiled()


def tensors() -> list[torch.Tensor]:
    return [
        torch.nn.Parameter(torch.randn(3, 3), requires_grad=False),
        torch.randn(2, 3, 4),
        torch.tensor(1.0),
    ]


FORMS: dict[str, Callable[[list[torch.Tensor]], object]] = {
    "strides": lambda given: setattr(given[0], "data", given[0].data.t()),
    "strides in place": lambda given: given[0].t_(),
    "size": lambda given: setattr(given[1], "data", torch.randn(2, 5, 4)),
    "rank": lambda given: setattr(given[2], "data", torch.ones(1)),
    "dtype": lambda given: setattr(given[2], "data", torch.tensor(1.0, dtype=torch.float64)),
    "conjugate": lambda given: given.__setitem__(1, torch._neg_view(given[1])),
}


@pytest.mark.parametrize("change", FORMS)
def test_forms(loops: Loops, change: str) -> None:
    given = tensors()
    forms = loops.forms(given, -1)
    given[0].data = torch.randn(3, 3)
    assert loops.forms_are(given, forms), "the memory does not count"
    FORMS[change](given)
    assert not loops.forms_are(given, forms)


def test_forms_but_for_one_size(loops: Loops) -> None:
    buffer = torch.randn(9, 3)
    caches = [buffer[:4], buffer[:5]]
    forms = loops.forms(caches, 0)
    assert loops.forms_are([buffer[:6], buffer[:2]], forms)
    assert not loops.forms_are([buffer[:4, :2], buffer[:5]], forms)
    assert not loops.forms_are([torch.randn(3, 4).t(), buffer[:5]], forms)


def test_types(loops: Loops) -> None:
    class Other(torch.nn.Linear):
        pass

    layers = [torch.nn.Linear(2, 2), torch.nn.Identity()]
    kinds = [type(layer) for layer in layers]
    assert loops.types_are(layers, kinds)
    layers[0].__class__ = Other
    assert not loops.types_are(layers, kinds)


def test_dicts(loops: Loops) -> None:
    layers = [torch.nn.Linear(2, 2), torch.nn.Identity()]
    dicts = [vars(layer) for layer in layers]
    layers[1].mark = 1  # type: ignore[assignment]
    assert loops.dicts_are(layers, dicts)
    layers[1].__dict__ = dict(vars(layers[1]))
    assert not loops.dicts_are(layers, dicts)


def test_versions(loops: Loops) -> None:
    given: list[dict[str, Any]] = [{"a": 1}, {}, vars(torch.nn.Identity())]
    for change in (lambda: given[0].update(a=2), lambda: given[1].update(b=1), lambda: given[2].popitem()):
        versions = loops.versions(given)
        assert loops.versions_are(given, versions)
        change()
        assert not loops.versions_are(given, versions)


@pytest.mark.parametrize(
    "change",
    [
        lambda given: given[0].update(a=2),
        lambda given: given[1].update(b=1),
        lambda given: given[1].update({"b": 1}),
        lambda given: given[1].setdefault("b", 1),
        lambda given: given[2].popitem(),
        lambda given: given[2].clear(),
    ],
)
def test_changes_of_dicts_are_seen(loops: Loops, change: Callable[[Any], object]) -> None:
    given: list[dict[str, Any]] = [{"a": 1}, {}, vars(torch.nn.Identity())]
    unchanged = _unchanged_dicts(loops, given)
    assert all(unchanged() for _ in range(5))
    change(given)
    assert not unchanged()
    assert not unchanged()


def test_code_and_defaults(loops: Loops) -> None:
    def one(a: int = 1, *, b: int = 2) -> int:
        return a + b

    def other(a: int = 1, *, b: int = 2) -> int:
        return a - b

    changes: list[Callable[[], object]] = [
        lambda: setattr(one, "__code__", other.__code__),
        lambda: setattr(one, "__defaults__", (3,)),
        lambda: setattr(one, "__kwdefaults__", {"b": 2}),
        lambda: setattr(one, "__kwdefaults__", None),
    ]
    for change in changes:
        codes = loops.codes([tensors, one])
        assert loops.codes_are([tensors, one], codes)
        change()
        assert not loops.codes_are([tensors, one], codes)


OTHERS: dict[str, Callable[[torch.Tensor], object]] = {
    "a slice": lambda tensor: tensor[1:],
    "another tensor": lambda tensor: tensor.detach(),
    "the storage": lambda tensor: tensor.untyped_storage(),
    "an array": lambda tensor: tensor.numpy(),
}


@pytest.mark.parametrize("other", OTHERS)
def test_memory_that_others_have(loops: Loops, other: str) -> None:
    given = [torch.randn(3, 4), torch.randn(2)]
    for tensor in given:
        loops.references(tensor)
    alone = loops.references(given[0])
    where = ([tensor.data_ptr() for tensor in given], [tensor.nbytes for tensor in given], alone)
    assert loops.are_alone(given, *where)
    held = OTHERS[other](given[1])
    assert loops.references(given[1]) != alone
    assert not loops.are_alone(given, *where)
    del held
    assert loops.are_alone(given, *where)


def test_another_place_or_size(loops: Loops) -> None:
    tensor = torch.randn(3, 4)
    loops.references(tensor)
    where, alone = tensor.data_ptr(), loops.references(tensor)
    assert loops.are_alone([tensor], [where], [48], alone)
    assert not loops.are_alone([tensor], [where + 16], [48], alone)
    assert not loops.are_alone([tensor], [where], [32], alone)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_aliases(loops: Loops, mode: Any) -> None:
    with mode():
        given = [torch.randn(2, 6), torch.randn(3, 4)[1:]]
        found = loops.aliases(given, [(2, 3), (2, 2, 2)], [(6, 1), (4, 2, 1)], [2, 0])
        assert torch.equal(found[0], given[0][:, 2:5])
        assert torch.equal(found[1], given[1].reshape(2, 2, 2))
        assert [each.untyped_storage().data_ptr() for each in found] == [
            each.untyped_storage().data_ptr() for each in given
        ]
        assert not any(each._is_view() for each in found)
        assert [each.is_inference() for each in found] == [each.is_inference() for each in given]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_other_rows(loops: Loops, mode: Any) -> None:
    with mode():
        memory = [torch.arange(40.0).view(10, 4), torch.arange(30.0).view(10, 3)]
        given = loops.aliases(memory, [(2, 4), (3, 3)], [(4, 1), (3, 1)], [4, 3])
        begins = [tensor.data_ptr() for tensor in given]
        moved = [begins[0], begins[1] + 3 * 4]
        found = loops.resized(given, 0, [5, 4], moved)
        assert torch.equal(found[0], memory[0][1:6])
        assert torch.equal(found[1], memory[1][2:6])
        back = loops.resized(found, 0, [2, 3], begins)
        assert torch.equal(back[0], memory[0][1:3])
        assert torch.equal(back[1], memory[1][1:4])
        assert [each.is_contiguous() for each in back] == [True, True]


@pytest.mark.parametrize("way", ["weak reference", "attribute", "dlpack"])
def test_tensors_that_somebody_knows_are_not_changed(way: str) -> None:
    loops = step_loops._compiled()
    tensor = torch.zeros(6, 2)
    where, rows, held = [tensor.data_ptr()], tensor.shape[0], None
    if way == "weak reference":
        held = weakref.ref(tensor)
    elif way == "attribute":
        tensor.tag = 1  # type: ignore[attr-defined]
    elif way == "dlpack":
        held = torch.utils.dlpack.to_dlpack(tensor)
    (found,) = loops.resized([tensor], 0, [2], where)
    assert found is not tensor
    assert (found.shape[0], tensor.shape[0]) == (2, rows)
    assert not vars(found)
    del held


def test_tensors_that_nobody_knows_are_changed() -> None:
    tensor = torch.zeros(6, 2)
    (found,) = step_loops._compiled().resized([tensor], 0, [2], [tensor.data_ptr()])
    assert found is tensor
    assert tensor.shape == (2, 2)


def test_what_is_held_once(loops: Loops) -> None:
    holders = [{"keys": torch.ones(1)}, {"keys": torch.ones(2)}]
    found = loops.held_once(holders, ["keys", "keys"])
    assert found is not None
    assert [each.numel() for each in found] == [1, 2]
    del found
    kept = holders[1]["keys"]
    assert loops.held_once(holders, ["keys", "keys"]) is None
    del kept
    assert loops.held_once(holders, ["keys", "keys"]) is not None
    assert loops.held_once([{}], ["keys"]) is None


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("forms", ([1], -1)),
        ("forms_are", ([torch.ones(1)], b"")),
        ("types_are", ([1], [])),
        ("dicts_are", ([object()], [{}])),
        ("references", (1,)),
        ("versions", (1,)),
        ("codes", ([1],)),
        ("codes_are", ([tensors], ())),
        ("are_alone", ([1], [2], [3], (1, 1))),
        ("aliases", ([torch.ones(1)], [("a",)], [(1,)], [0])),
        ("resized", ([torch.ones(2)], 1, [1], [0])),
        ("resized", ([torch.ones(2)], 0, ["a"], [0])),
        ("resized", ([torch.ones(2)], 0, [1], [])),
        ("held_once", ([{}], [])),
    ],
)
def test_wrong_arguments_are_errors(name: str, given: Any) -> None:
    with pytest.raises((TypeError, ValueError, AttributeError, KeyError)):
        getattr(step_loops._compiled(), name)(*given)


def test_attributes_are_stored_past_their_class() -> None:
    class Sealed:
        @property
        def keys(self) -> int:
            raise AssertionError

        def __setattr__(self, name: str, value: Any) -> None:
            raise AssertionError

    store = step_loops._compiled().store
    sealed, local = Sealed(), threading.local()
    store(sealed, "keys", 3)
    assert vars(sealed) == {"keys": 3}
    try:
        object_setattr_ignore_descriptor(local, "keys", 4)
    except AttributeError:  # torch 2.11 does not know of them
        with pytest.raises(AttributeError):
            store(local, "keys", 4)
    else:
        store(local, "keys", 5)
        assert local.keys == 5
    with pytest.raises(AttributeError):
        store(1, "keys", 3)


def test_without_a_compiler_those_in_python_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(step_loops, "_compiled", missing)
    current = Current()
    current.build(wait=True)
    assert isinstance(current.loops, PythonLoops)
