import pytest
import torch

from trimtab.errors import TrimtabError
from trimtab.steering.scope import Scope

# Row 0: two tokens of padding, four of prompt, two of answer; the user's text ends after two.
# Row 1: no padding, five tokens of prompt, three of answer; the user's text ends after three.
POSITIONS = torch.tensor([[-1, -1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]])
REAL = POSITIONS >= 0
PROMPT = torch.tensor([4, 5])
INSTRUCTION = torch.tensor([2, 3])
EXPECTED = {
    "all": ["..######", "########"],
    "last": [".....###", "....####"],
    "prompt": ["..####..", "#####..."],
    "generated": ["......##", ".....###"],
    "post_instruction": ["....##..", "...##..."],
    "[0,3)": ["..###...", "###....."],
    "[4,6)": ["......##", "....##.."],
}


def drawn(mask: torch.Tensor) -> list[str]:
    return ["".join("#" if cell else "." for cell in row) for row in mask.tolist()]


@pytest.mark.parametrize("text", EXPECTED)
def test_masks(text: str):
    scope = Scope.parse(text)
    assert drawn(scope.mask(POSITIONS, REAL, PROMPT, INSTRUCTION)) == EXPECTED[text]


@pytest.mark.parametrize("text", EXPECTED)
def test_text_round_trip(text: str):
    assert str(Scope.parse(text)) == text
    assert Scope.parse(str(Scope.parse(text))) == Scope.parse(text)
    assert Scope.parse(Scope.parse(text)) == Scope.parse(text)


@pytest.mark.parametrize("text", ["", "everything", "[3,3)", "[5,2)", "[-1,2)", "[0,2]", "ALL", 3])
def test_unknown_scopes_are_refused(text):
    with pytest.raises(TrimtabError) as caught:
        Scope.parse(text)
    assert "post_instruction" in caught.value.advice


@pytest.mark.parametrize("text", ["last", "prompt", "generated", "post_instruction"])
def test_an_unknown_boundary_is_refused(text: str):
    with pytest.raises(TrimtabError, match="boundary"):
        Scope.parse(text).mask(POSITIONS, REAL)
    assert Scope.parse(text).needs_prompt


def test_an_empty_post_instruction_offers_last():
    with pytest.raises(TrimtabError) as caught:
        Scope.parse("post_instruction").mask(POSITIONS, REAL, PROMPT, PROMPT)
    assert "last" in caught.value.advice
    with pytest.raises(TrimtabError) as caught:
        Scope.parse("post_instruction").mask(POSITIONS, REAL, PROMPT, None)
    assert "last" in caught.value.advice


def test_spaces_in_a_window():
    assert Scope.parse(" [0, 5) ") == Scope("window", 0, 5)
