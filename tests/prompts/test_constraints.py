"""Constraints: what is banned is in no legal slot, and each violation is counted by its kind."""

from collections.abc import Sequence

import pytest
import torch

from tiny import SPECIAL
from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.prompts.task.constraints import Bound, Constraints, distance
from trimtab.prompts.task.rows import PromptRow, lay_out, round_trips
from trimtab.prompts.task.words import Words

REQUESTS = ["How do I borrow the ledger?", "Is that allowed today?"]


@pytest.fixture(scope="module")
def rows(llama: LanguageModel) -> list[PromptRow]:
    return lay_out(llama, REQUESTS)


def ids_of(lm: LanguageModel, text: str) -> tuple[int, ...]:
    return tuple(lm.tokenizer.encode(text, add_special_tokens=False))


def text_of(lm: LanguageModel, ids: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(ids)))


def bound(lm: LanguageModel, rows: list[PromptRow], **more: object) -> Bound:
    return Constraints(**more).bind(lm, rows)  # pyright: ignore[reportArgumentType]


def random_slots(lm: LanguageModel, bound: Bound, count: int, length: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    tokens = bound.allowed.nonzero()[:, 0]
    picks = torch.randint(len(tokens), (count, length), generator=generator)
    return tokens[picks].tolist()


def test_special_tokens_and_ids_beyond_the_tokenizer_are_never_allowed(lm: LanguageModel) -> None:
    allowed = bound(lm, lay_out(lm, REQUESTS), charset="any").allowed
    assert len(allowed) == 344
    special = [lm.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL]
    assert not allowed[special].any()
    assert not allowed[len(lm.tokenizer) :].any() and len(lm.tokenizer) < 344
    # A byte that is no character alone.
    halves = [t for t in range(344) if "\ufffd" in lm.tokenizer.decode([t])]
    assert len(halves) > 100 and not allowed[halves].any()
    assert allowed[list(ids_of(lm, "the"))].all()


def test_allowed_tokens_alone_break_nothing(llama: LanguageModel, rows: list[PromptRow]) -> None:
    made = bound(llama, rows, words=("cat", "e"), tokens=("the", 50))
    texts = {t: text_of(llama, [t]) for t in made.allowed.nonzero()[:, 0].tolist()}
    assert all(" " <= char <= "~" for text in texts.values() for char in text)
    assert not [text for text in texts.values() if text.strip().lower() in ("the", "e", "cats")]
    assert 50 not in texts
    every = bound(llama, rows)
    lost = every.allowed.nonzero()[:, 0].tolist()
    gone = {text_of(llama, [t]).strip().lower() for t in lost if t not in texts}
    assert {"the", "e", "cats"} <= gone and len(gone) <= 8


def test_charsets_differ(llama: LanguageModel, rows: list[PromptRow]) -> None:
    newline = ids_of(llama, "\n")[0]
    assert bound(llama, rows, charset="any").allowed[newline]
    assert not bound(llama, rows, charset="printable").allowed[newline]
    accented = ids_of(llama, "é")  # two bytes, two tokens
    assert bound(llama, rows, charset="printable").explain(accented) == {}
    assert bound(llama, rows).explain(accented) == {"charset": 1}


def test_no_legal_slot_contains_what_is_banned(llama: LanguageModel, rows: list[PromptRow]) -> None:
    limits = {
        "words": ("an", "to", "so", "is"),
        "reference": ids_of(llama, "Please talk only"),
        "max_overlap": 0.25,
        "min_edits": 4,
        "max_chars": 9,
    }
    made = bound(llama, rows, **limits)
    slots = random_slots(llama, made, 1500)
    legal = made.legal(slots)
    assert 30 < sum(legal) < 1400
    assert legal == [count == 0 for count in made.violations(slots)]
    words = Words(("an", "to", "so", "is"))
    back = round_trips(llama, slots, rows)
    for slot, fine, returns in zip(slots, legal, back, strict=True):
        text = text_of(llama, slot)
        shared = sum(token in limits["reference"] for token in slot)
        broken = words.found(text) or len(text) > 9 or shared > 1 or not returns
        if broken:
            assert not fine, text
        if not fine:
            assert made.explain(slot)
    # The same slots with only words banned: some hold one, though no token alone does.
    split = bound(llama, rows, words=("an", "to", "so", "is"), round_trip=False)
    spelled = [slot for slot in slots if "words" in split.explain(slot)]
    assert spelled and all(split.allowed[slot].all() for slot in spelled)


def test_kinds_are_counted(llama: LanguageModel, rows: list[PromptRow]) -> None:
    reference = ids_of(llama, "The cats sleep")
    made = bound(
        llama, rows, words=("cat",), reference=reference, max_overlap=0.25, min_edits=3, max_chars=8
    )
    counted = made.explain(reference)
    assert counted["words"] == 1
    assert counted["edits"] == 3
    assert counted["chars"] == len("The cats sleep") - 8
    assert counted["overlap"] == len(reference) - int(0.25 * len(reference))
    assert made.violations([reference]) == [sum(counted.values())]
    assert made.explain((*ids_of(llama, "pier"), *ids_of(llama, "<end>")))["tokens"] == 1


def test_a_token_of_the_reference_counts_in_any_dress(
    llama: LanguageModel, rows: list[PromptRow]
) -> None:
    plain, spaced = ids_of(llama, "a")[0], ids_of(llama, " a")[0]
    assert plain != spaced
    made = bound(llama, rows, reference=(plain,), max_overlap=0.0, round_trip=False)
    assert made.explain((spaced,)) == {"overlap": 1}


def test_text_that_comes_back_as_other_tokens_is_illegal(
    llama: LanguageModel, rows: list[PromptRow]
) -> None:
    made = bound(llama, rows)
    split = tuple(ids_of(llama, letter)[0] for letter in "the")
    assert ids_of(llama, "the") != split
    assert made.explain(split) == {"round_trip": 1}
    assert made.strayed(split) > 0 == made.strayed(ids_of(llama, "the"))
    assert made.legal([split, ids_of(llama, "the")]) == [False, True]
    assert bound(llama, rows, round_trip=False).legal([split]) == [True]


def test_checks_are_remembered(
    llama: LanguageModel, rows: list[PromptRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bound(llama, rows, max_chars=9)
    slots = random_slots(llama, made, 40)
    first = made.violations(slots)
    monkeypatch.setattr(llama, "tokenizer", None)
    assert made.violations(slots) == first
    assert made.legal(slots) == [count == 0 for count in first]


@pytest.mark.parametrize(
    "wrong",
    [
        {"charset": "latin"},
        {"words": ("42",)},
        {"max_overlap": 1.5, "reference": (5,)},
        {"max_overlap": 0.5},
        {"min_edits": 2},
        {"max_chars": -1},
        {"tokens": "the"},
    ],
)
def test_contradictions_are_refused(wrong: dict) -> None:
    with pytest.raises(TrimtabError):
        Constraints(**wrong)


def test_nothing_left_is_refused(llama: LanguageModel, rows: list[PromptRow]) -> None:
    with pytest.raises(TrimtabError, match="no token that is allowed"):
        bound(llama, rows, tokens=tuple(range(344)))


def test_distance() -> None:
    assert distance("kitten", "sitting") == 3
    assert distance([], [1, 2]) == 2 == distance([1, 2], [])
