"""The advice: rules on rows whose figures are given, so that each rule can be seen to act."""

from __future__ import annotations

from typing import Any

from trimtab.levers.advice import advise
from trimtab.levers.row import LeverRow, Validated

N = 32


def row(name: str, hits: int, kind: str = "weights", **more: Any) -> LeverRow:
    """A lever that shows the behavior in so many of 32 answers, on both splits."""
    scores = tuple(float(i < hits) for i in range(N))
    damage = more.pop("damage", 0.1)
    coherence = more.pop("coherence", 1.0)
    fields: dict[str, Any] = {
        "sign": 1, "score": hits / N, "low": 0.0, "high": 1.0, "n": N,
        "coherence": coherence, "coherence_low": 0.9, "coherence_high": 1.0,
        "damage": 0.0, "damage_p95": damage, "damage_low": 0.0, "damage_high": 0.1,
        "spill": None, "spill_p95": None, "spill_low": None, "spill_high": None,
        "scores": scores, "name": name, "kind": kind, "lever": name, "strength": 1.0,
        "limited_by": "budget", "within": damage <= 0.5,
        "validation": Validated(scores, hits / N, coherence, damage),
        "gap": None, "closed": None, "gain": hits / N, "gain_low": 0.0, "gain_high": 1.0,
        "perplexity": 2.0, "context_tokens": 0.0, "ms_per_token": 0.0, "baked": False,
        "bakeable": "no", "calls": 1000, **more,
    }  # fmt: skip
    return LeverRow(**fields)


def rows(*levers: LeverRow, null: int = 0) -> list[LeverRow]:
    return [row("unsteered", 0, "baseline"), *levers, row("random", null, "null")]


def test_the_cheapest_of_those_that_are_as_good() -> None:
    found = advise(
        rows(
            row("vector", 32),
            row("bias", 31, baked=True, bakeable="exact: bias", calls=1200),
            row("plain prompt", 32, "prompt", calls=0, context_tokens=6.0),
            row("weak", 12, calls=10),
        ),
        "refusal",
        0.5,
    )
    assert found.choice == "plain prompt" and found.free == "bias"
    assert set(found.equal) == {"vector", "bias", "plain prompt"}
    assert set(found.usable) == {*found.equal, "weak"}
    assert "use the plain prompt" in found.sentence
    assert "0 model calls" in found.sentence and "6 tokens" in found.sentence
    assert "exact: bias" in found.sentence and "97 %" in found.sentence


def test_better_by_more_than_chance_is_worth_its_price() -> None:
    found = advise(
        rows(row("vector", 32), row("plain prompt", 16, "prompt", calls=0, context_tokens=6.0)),
        "topic",
        0.1,
    )
    assert (found.choice, found.free, found.equal) == ("vector", None, ("vector",))
    assert "beats the other 1 usable levers by more than chance" in found.sentence


def test_what_is_over_budget_or_broken_is_no_choice() -> None:
    over = row("prompt", 32, "prompt", damage=0.9, calls=0)
    broken = row("vector", 32, coherence=0.4)
    fine = row("soft prompt", 20, "prompt", context_tokens=4.0)
    found = advise(rows(over, broken, fine), "mood", 0.5)
    assert (found.choice, found.usable) == ("soft prompt", ("soft prompt",))
    assert "no other lever is usable" in found.sentence
    assert found.free is None and "no lever that leaves the context free" in found.sentence
    none = advise(rows(over), "mood", 0.5)
    assert none.choice is None and "0.90 nats of damage (on-target KL)" in none.sentence
    none = advise(rows(broken), "mood", 0.5)
    assert none.choice is None and "coherence of 0.40" in none.sentence


def test_chance_and_random_directions_are_no_effect() -> None:
    found = advise(rows(row("vector", 3)), "mood", 0.5)
    assert found.choice is None and "more than chance" in found.sentence
    found = advise(rows(row("vector", 20), null=20), "mood", 0.5)
    assert found.choice is None


def test_it_decides_on_validation_and_tells_the_test() -> None:
    lucky = row("lucky", 32)
    lucky = LeverRow(
        **{**vars(lucky), "validation": Validated((0.0,) * N, 0.0, 1.0, 0.1), "calls": 0}
    )
    found = advise(rows(lucky, row("vector", 24)), "mood", 0.5)
    assert found.choice == "vector" and "75 %" in found.sentence


def test_no_levers_at_all() -> None:
    assert "no lever could be made" in advise(rows(), "mood", 0.5).sentence
