"""A behavior from one sentence: requests of the bank with it and without, disjoint between splits."""

from __future__ import annotations

from typing import Any

import pytest

import trimtab as tt
from trimtab.behaviors.bank import everyday_requests
from trimtab.behaviors.instruction import instructed
from trimtab.behaviors.parts import Example
from trimtab.errors import TrimtabError

PIRATE = "Talk like a pirate."


def test_the_bank_is_large_varied_and_without_repeats() -> None:
    requests = everyday_requests()
    assert len(requests) >= 240 and len(everyday_requests("plain")) >= 200
    assert len(everyday_requests("longer")) == len(everyday_requests("two_turn")) == 24
    assert len({Example(request).key for request in requests}) == len(requests)
    assert min(len(str(request)) for request in everyday_requests("longer")) > 80
    roles = [[turn["role"] for turn in request] for request in everyday_requests("two_turn")]  # pyright: ignore
    assert roles == [["user", "assistant", "user"]] * 24


def test_an_instruction_stands_where_it_is_asked_to() -> None:
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi."}]
    assert instructed("Hi.", PIRATE) == f"Hi. {PIRATE}"
    assert instructed("Hi.", PIRATE, "before") == f"{PIRATE} Hi."
    turn = {"role": "user", "content": "Hi."}
    assert instructed("Hi.", PIRATE, "system") == [{"role": "system", "content": PIRATE}, turn]
    assert instructed(said, PIRATE, "system") == [{"role": "system", "content": PIRATE}, turn]
    assert instructed(said, PIRATE) == [said[0], {"role": "user", "content": f"Hi. {PIRATE}"}]
    two = everyday_requests("two_turn")[0]
    assert instructed(two, PIRATE)[-1]["content"].endswith(PIRATE)  # pyright: ignore
    assert instructed(two, PIRATE)[:2] == two[:2] and said[1]["content"] == "Hi."


@pytest.mark.parametrize("away", [None, "Talk like a lawyer."])
def test_no_request_stands_in_two_splits(away: str | None) -> None:
    behavior = tt.Behavior.from_instruction(PIRATE, away, judge={"kind": "pattern", "toward": {}})
    assert behavior.name == "talk_like_a_pirate" and behavior.paired
    assert len(behavior.toward) == len(behavior.away) == 80 and len(behavior.neutral) == 24
    splits = behavior.split(0)
    seen: list[set[str]] = []
    for part in (splits.train, splits.validation, splits.test):
        requests: set[str] = set()
        for toward, other in zip(part.toward, part.away, strict=True):
            plain = str(other.prompt).removesuffix(f" {away}")
            assert toward.prompt == f"{plain} {PIRATE}"
            requests.add(plain)
        requests |= {str(example.prompt) for example in part.neutral}
        assert not any(requests & other for other in seen)
        seen.append(requests)


def test_own_requests_and_a_file() -> None:
    behavior = tt.Behavior.from_instruction(
        PIRATE, requests=["One?", "Two?", "Three?", "Four?"], where="system", examples=3, name="p"
    )
    assert behavior.name == "p" and len(behavior.toward) == 3
    assert tt.Behavior(**behavior.to_dict()) == behavior


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ((" ",), "toward"),
        (("x" * 5000,), "5,000 characters"),
        ((PIRATE, "Talk  like a pirate."), "the same instruction twice"),
        ((3,), "toward"),
    ],
)
def test_sentences_that_cannot_be_used_are_refused(given: Any, found: str) -> None:
    with pytest.raises(TrimtabError, match=found):
        tt.Behavior.from_instruction(*given)
    with pytest.raises(TrimtabError, match="requests"):
        tt.Behavior.from_instruction(PIRATE, requests=[""])
