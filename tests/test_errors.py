import copy

from trimtab.errors import TrimtabError


def test_three_short_lines_and_the_parts():
    error = TrimtabError("scope 'middle'", "no such scope", "use all")
    assert str(error).splitlines() == [
        "scope 'middle'",
        "  found: no such scope",
        "  advice: use all",
    ]
    assert (error.asked, error.found, error.advice) == (
        "scope 'middle'",
        "no such scope",
        "use all",
    )


def test_survives_a_copy():
    error = copy.copy(TrimtabError("a", "b", "c"))
    assert str(error) == str(TrimtabError("a", "b", "c"))
