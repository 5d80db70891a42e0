"""Options of single decoders, as they are typed and as they are given."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.types import UnmaskRule
from server.options import OPTIONS, WrongOption, options_of, parse_unmask


@given(st.floats(0, 1))
def test_the_confidence_rule_is_parsed(alpha: float) -> None:
    assert parse_unmask(f"confidence:{alpha!r}") == UnmaskRule(rule="confidence", alpha=alpha)


@given(st.floats(0, 1e6), st.booleans())
def test_the_entropy_rule_is_parsed(gamma: float, minus_max: bool) -> None:
    text = f"entropy:{gamma!r}" + ":minus_max" * minus_max
    assert parse_unmask(text) == UnmaskRule(rule="entropy", gamma=gamma, minus_max=minus_max)


def test_the_one_step_rule_is_parsed() -> None:
    assert parse_unmask("one_step") == UnmaskRule(rule="one_step")


@given(st.one_of(st.text(max_size=12), st.sampled_from(["confidence", "confidence:", "entropy:1:x", "one_step:1"])))
def test_any_other_unmasking_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_unmask(text)


@pytest.mark.parametrize("number", ["nan", "-1", "inf1", "1.5", "-0.1"])
def test_a_confidence_out_of_range_is_refused(number: str) -> None:
    with pytest.raises(ValueError):
        parse_unmask(f"confidence:{number}")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("decoder", ["blt", "blt-s", "blt-d", "blt-dv", "auto"])
def test_an_option_is_accepted_only_by_its_decoders(option: str, decoder: str) -> None:
    if decoder in OPTIONS[option]:
        assert options_of(decoder, {option: 1}) == {option: 1}  # type: ignore[arg-type]
    else:
        with pytest.raises(WrongOption, match=option):
            options_of(decoder, {option: 1})  # type: ignore[arg-type]
    assert options_of(decoder, {option: None}) == {}  # type: ignore[arg-type]
