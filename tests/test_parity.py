"""Shell and Python agree: every command offers its public function's options, with its defaults."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import trimtab.cli  # noqa: F401, registers the commands
from trimtab.arguments import sign_of, signs_of
from trimtab.cli.app import app
from trimtab.errors import TrimtabError


def test_one_word_for_a_direction() -> None:
    assert [signs_of(word) for word in ("toward", "away", "both")] == [(1,), (-1,), (1, -1)]
    assert [sign_of(word) for word in ("toward", "away")] == [1, -1]
    with pytest.raises(TrimtabError, match="'up'[^$]*use toward, away or both"):
        signs_of("up")
    with pytest.raises(TrimtabError, match="'both'[^$]*use toward or away"):
        sign_of("both")


@pytest.mark.parametrize("command", ["tune", "laws", "levers", "close-gap"])
def test_the_old_word_is_refused(command: str) -> None:
    refused = CliRunner().invoke(app, [command, "harbor", "refusal", "--away"])
    assert refused.exit_code == 2 and "No such option: --away" in refused.stderr
