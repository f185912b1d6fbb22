"""The option `--sparsify` of the commands that write a vector."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.errors import TrimtabError

Sparsify = Annotated[
    float | None,
    typer.Option(
        "--sparsify",
        metavar="SHARE",
        help="Write the vector with only this share of its dimensions, those that carry its effect "
        "(0.2 keeps a fifth); its norm is restored.",
    ),
]


def check_share(share: float | None) -> None:
    """Refuse a share before any work is done for it."""
    if share is not None and not 0 < share <= 1:
        raise TrimtabError(
            asked=f"--sparsify {share:g}",
            found="a share outside (0, 1]",
            advice="give the share of dimensions to keep, such as 0.2",
        )
