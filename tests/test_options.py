"""Options: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import pickle

import pytest
from torch._inductor import config as inductor_config

from fxopt.errors import FxoptError, OptionTypeError, OptionValueError, UnknownOption, UnsupportedMode
from fxopt.options import Options


def parse(mode: str | None = None, options: object = None, **environ: str) -> Options:
    return Options.parse(mode, options, pass_names=("rewrite-attention",), environ=environ)  # type: ignore[arg-type]


def test_defaults() -> None:
    options = parse()
    assert options == Options()
    assert options.host == "auto"
    assert options.mode == "default"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_every_mode_of_torch_compile_is_accepted(mode: str) -> None:
    assert parse(mode).mode == mode


def test_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(UnsupportedMode, match="reduce-overhead"):
        parse("reduce-overheads")


def test_unknown_option_names_the_nearest_of_ours() -> None:
    with pytest.raises(UnknownOption, match="disable") as caught:
        parse(options={"disabel": ["rewrite-attention"]})
    assert isinstance(caught.value, FxoptError)


def test_unknown_option_names_the_nearest_of_the_host() -> None:
    with pytest.raises(UnknownOption, match=r"triton\.cudagraphs"):
        parse(options={"triton.cudagraph": True})


def test_host_options_pass_through() -> None:
    options = parse(options={"epilogue-fusion": False, "triton.cudagraphs": True})
    assert options.host_config == {"epilogue_fusion": False, "triton.cudagraphs": True}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"strict": 1}, "a bool"),
        ({"fuel": "3"}, "an integer"),
        ({"fuel": True}, "an integer"),
        ({"host": None}, "a string"),
        ({"disable": 3}, "pass name"),
        ({"disable": [3]}, "pass names"),
        ({"dump": 3}, "a directory"),
        ({"epilogue_fusion": "yes"}, "a bool"),
        ({3: True}, "string"),
        (["host"], "a dict"),
    ],
)
def test_wrong_types_say_what_is_wanted(options: object, wanted: str) -> None:
    with pytest.raises(OptionTypeError, match=wanted):
        parse(options=options)


def test_wrong_values_name_the_nearest() -> None:
    with pytest.raises(OptionValueError, match="inductor"):
        parse(options={"host": "inducter"})
    with pytest.raises(OptionValueError, match="rewrite-attention"):
        parse(options={"disable": "rewrite-atention"})
    with pytest.raises(OptionValueError, match="from 0 on"):
        parse(options={"fuel": -1})


def test_replay() -> None:
    assert Options.parse(environ={"FXOPT_REPLAY": "never"}).replay == "never"
    with pytest.raises(OptionValueError, match="auto, never, always"):
        Options.parse(options={"replay": "sometimes"}, environ={})


def test_pass_names_may_be_written_with_underscores() -> None:
    assert parse(options={"disable": "rewrite_attention"}).disable == ("rewrite-attention",)


def test_environment_is_overridden_by_options() -> None:
    environ = {
        "FXOPT_HOST": "eager",
        "FXOPT_FUEL": "7",
        "FXOPT_DISABLE": "rewrite-attention",
        "FXOPT_STRICT": "1",
    }
    assert parse(**environ) == Options(host="eager", fuel=7, disable=("rewrite-attention",), strict=True)
    assert parse(options={"host": "inductor"}, **environ).host == "inductor"


@pytest.mark.parametrize(
    ("name", "value"), [("FXOPT_FUEL", "many"), ("FXOPT_FUEL", "-1"), ("FXOPT_HOST", "xyz"),
                        ("FXOPT_DISABLE", "no-such-pass"), ("FXOPT_KERNELS", "sometimes"),
                        ("FXOPT_TUNE_SECONDS", "nan"), ("FXOPT_TUNE_SECONDS", "a while"),
                        ("FXOPT_STRICT", "maybe")]
)  # fmt: skip
def test_an_error_in_the_environment_names_the_variable(name: str, value: str) -> None:
    with pytest.raises((OptionTypeError, OptionValueError), match=f"environment variable {name} "):
        parse(**{name: value})


@pytest.mark.parametrize("text", ["no", "off", "FALSE", "0", "False"])
def test_words_for_no_in_the_environment(text: str) -> None:
    off = parse(FXOPT_STRICT=text, FXOPT_GENERATE=text, FXOPT_FAST_DECODE=text)
    assert (off.strict, off.generate, off.fast_decode) == (False, False, False)
    assert parse(FXOPT_STRICT="Yes").strict


def test_every_option_of_the_host_takes_its_default() -> None:
    for name, value in inductor_config.get_config_copy().items():
        assert parse(options={name: value}).host_config == {name: value}


def test_a_variable_that_is_nearly_an_option() -> None:
    with pytest.warns(
        UserWarning, match=r"no environment variable FXOPT_STRCT. Nearest variables: FXOPT_STRICT"
    ):
        assert parse(FXOPT_STRCT="1") == Options()


def test_variables_of_others(recwarn: pytest.WarningsRecorder) -> None:
    assert parse(FXOPT_GOLDEN="1", FXOPT_MY_OWN="1", FXOPT_strict="1", STRICT="1", FXOPT_="1") == Options()
    assert not recwarn.list


def test_what_the_call_gives_is_not_said_to_come_from_the_environment() -> None:
    with pytest.raises(OptionValueError, match="^option 'host' has no value 'xyz'"):
        parse(options={"host": "xyz"}, FXOPT_HOST="eager")


def test_no_nearest_name_where_nothing_is_near() -> None:
    with pytest.raises(OptionValueError, match="value 'xyz'. Valid: auto"):
        parse(options={"host": "xyz"})
    with pytest.raises(UnsupportedMode, match="not supported. Valid modes"):
        parse("xyz")
    with pytest.raises(UnknownOption, match="'xyzxyz'. All fxopt options"):
        parse(options={"xyzxyz": 1})


def test_the_users_dict_is_left_alone() -> None:
    given = {"epilogue-fusion": False}
    parse(options=given)
    assert given == {"epilogue-fusion": False}


def test_errors_survive_pickling() -> None:
    with pytest.raises(UnknownOption) as caught:
        parse(options={"disabel": True})
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is UnknownOption
    assert str(copy) == str(caught.value)


@pytest.mark.parametrize(
    ("mode", "given", "seconds"),
    [
        ("default", {}, 0.0),
        ("reduce-overhead", {}, 0.0),
        ("max-autotune", {}, float("inf")),
        ("max-autotune-no-cudagraphs", {}, float("inf")),
        ("max-autotune", {"tune_seconds": 5}, 5),
        ("default", {"tune_seconds": 2.5}, 2.5),
    ],
)
def test_kernels_are_measured_on_request_alone(mode: str, given: dict[str, float], seconds: float) -> None:
    assert parse(mode, given).measuring_seconds == seconds


def test_quantize_takes_a_format_or_rules_in_order() -> None:
    assert parse(options={"quantize": "int8_dynamic"}).quantize == (("*", "int8-dynamic"),)
    rules = {"*.down_proj": "int8", "*.up_proj": None, "*": "int4"}
    wanted = (("*.down_proj", "int8"), ("*.up_proj", "none"), ("*", "int4"))
    assert parse(options={"quantize": rules}).quantize == wanted
    assert parse(options={"quantize": list(rules.items())}).quantize == wanted
    assert parse(options={"quantize": None}).quantize == ()
    assert parse(options={"skip": "*.o_proj"}).skip == ("*.o_proj",)
    assert parse(options={"quantize": "int4"}).fingerprint != parse(options={"quantize": "nf4"}).fingerprint


@pytest.mark.parametrize(
    "bad", [{"quantize": "int5"}, {"quantize": {"*": "nf5"}}, {"group_size": 40}, {"group_size": -32}]
)
def test_wrong_formats_and_groups(bad: dict[str, object]) -> None:
    with pytest.raises(OptionValueError):
        parse(options=bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"quantize": 8},
        {"quantize": {3: "int8"}},
        {"quantize": ["int8"]},
        {"quantize": [("*", "int8", 32)]},
        {"quantize": [(["*"], "int8")]},
        {"group_size": "32"},
        {"skip": 3},
        {"skip": ["*.o_proj", 3]},
    ],
)
def test_wrong_types_of_quantization(bad: dict[str, object]) -> None:
    with pytest.raises(OptionTypeError):
        parse(options=bad)
