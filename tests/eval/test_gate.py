"""The promotion gate: promotes what is better beyond chance, and refuses for each reason of its own."""

import json

import pytest

from dapo.errors import DataError
from dapo.eval.gate import GateConfig, decide
from tests.eval.verdicts import many, prompt

CHAMPION = many(200, 100)
BETTER = many(200, 130)


def failed(decision):
    return [check.name for check in decision.checks if not check.passed]


def test_a_gain_beyond_chance_promotes():
    decision = decide(CHAMPION, BETTER, GateConfig())
    assert decision.promote
    assert decision.difference.value == pytest.approx(0.15)
    # 30 of 200 paired differences are 1: sqrt(0.15 x 0.85 / 200) x 1.96 on either side.
    assert decision.difference.low == pytest.approx(0.15 - 1.96 * 0.02525, abs=0.006)
    assert "lies above +0.000" in decision.reasons[0]
    assert {s.tag: s.prompts for s in decision.slices} == {"half:even": 100, "half:odd": 100}


@pytest.mark.parametrize(
    ("reason", "challenger", "gate"),
    [
        ("gain", CHAMPION, {}),
        ("gain", many(200, 90), {"max_slice_loss": None}),
        ("gain", BETTER, {"min_gain": 0.12}),
        ("prompts", BETTER, {"min_prompts": 201}),
        ("length", many(200, 130, tokens=151), {}),
        ("format", many(200, 130, format=0.97), {}),
        ("truncated", many(200, 130, truncated=True), {}),
    ],
)
def test_it_refuses_for_exactly_this_reason(reason, challenger, gate):
    decision = decide(CHAMPION, challenger, GateConfig(**gate))
    assert not decision.promote
    assert failed(decision) == [reason]
    assert len(decision.reasons) == 1


def test_a_gain_that_may_be_chance_is_refused():
    # Four won and one lost: the interval of resampled prompts holds 0.
    lucky = {
        name: prompt(name, [(result.accuracy == 1) ^ (name in ("p0", "p110", "p111", "p112", "p113"))])
        for name, result in CHAMPION.items()
    }
    decision = decide(CHAMPION, lucky, GateConfig(max_slice_loss=None))
    assert decision.difference.value > 0
    assert failed(decision) == ["gain"]


def test_failed_checks_are_no_verdicts_and_too_many_of_them_refuse():
    unsure = dict(BETTER)
    for i in range(100, 105):
        unsure[f"p{i}"] = prompt(f"p{i}", [None])
    decision = decide(CHAMPION, unsure, GateConfig())
    assert failed(decision) == ["failed"]
    assert decision.challenger["failed"] == 0.025
    assert decide(CHAMPION, unsure, GateConfig(max_failed=0.03)).promote
    assert decision.difference.value == pytest.approx(25 / 195), "prompts without a verdict are in neither side"


def slices(even, odd):
    """Prompts of two slices, so many of each 100 right."""
    return {
        f"{tag}{i}": prompt(f"{tag}{i}", [i < right], tags=[f"half:{tag}"])
        for tag, right in (("even", even), ("odd", odd))
        for i in range(100)
    }


def test_a_slice_that_got_worse_is_not_paid_for_by_another():
    decision = decide(slices(50, 50), slices(100, 40), GateConfig())
    assert failed(decision) == ["slices"]
    odd = next(one for one in decision.plain()["slices"] if one["tag"] == "half:odd")
    assert (odd["prompts"], odd["champion"], odd["challenger"]) == (100, 0.5, 0.4)
    assert "half:odd -0.100" in decision.reasons[0]
    assert "half:even" not in decision.reasons[0]


def test_a_slice_may_lose_what_chance_explains_or_what_is_allowed():
    assert decide(slices(50, 50), slices(100, 46), GateConfig()).promote, "within the limit"
    assert decide(slices(50, 50), slices(100, 40), GateConfig(max_slice_loss=0.2)).promote
    noisy = slices(50, 50)
    for i in (*range(6), *range(50, 56)):  # 12 of 100 verdicts changed, six either way, then six lost
        noisy[f"odd{i}"] = prompt(f"odd{i}", [i >= 50], tags=["half:odd"])
    assert "slices" not in failed(decide(slices(50, 50), noisy, GateConfig()))


def test_a_small_slice_is_shown_but_not_judged():
    champion = slices(50, 50) | {f"x{i}": prompt(f"x{i}", [True], tags=["rare"]) for i in range(5)}
    challenger = slices(90, 90) | {f"x{i}": prompt(f"x{i}", [False], tags=["rare"]) for i in range(5)}
    decision = decide(champion, challenger, GateConfig())
    assert decision.promote
    assert next(s for s in decision.slices if s.tag == "rare").difference.value == -1
    assert failed(decide(champion, challenger, GateConfig(min_slice_prompts=5))) == ["slices"]


def test_different_prompts_or_sample_counts_are_an_error_not_a_decision():
    with pytest.raises(DataError, match="200 and 199, 199 in common"):
        decide(CHAMPION, {k: v for k, v in BETTER.items() if k != "p0"}, GateConfig())
    twice = BETTER | {"p0": prompt("p0", [True, True])}
    with pytest.raises(DataError, match="p0 has 1 samples of the champion and 2"):
        decide(CHAMPION, twice, GateConfig())
    silent = {name: prompt(name, [None]) for name in CHAMPION}
    with pytest.raises(DataError, match="no prompt has a verdict"):
        decide(CHAMPION, silent, GateConfig())


def test_the_record_is_json_without_nan():
    nothing = {name: prompt(name, [None] if name != "p0" else [True]) for name in CHAMPION}
    decision = decide(CHAMPION, nothing, GateConfig()).plain()
    assert json.loads(json.dumps(decision, allow_nan=False)) == decision
    assert decision["gate"]["min_prompts"] == 30
    assert decision["promote"] is False
