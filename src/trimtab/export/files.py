"""What the exporters share: names for others to read, what a format can hold, refusals by name."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.vector import VectorSteering
from trimtab.steering.weights import Scaled


def public_name(name: str) -> str:
    """Return a model's name for others to read: without the folders of the maker's machine."""
    path = name.count("/") > 1 or name.startswith((".", "/", "~"))
    return Path(name).name if path else name


def constants(vector: VectorSteering, form: str) -> dict[int, Tensor]:
    """Return what a constant vector adds to the output of each active block.

    Args:
        vector: adds at `resid_post`, on every token.
        form: name of the format that holds nothing else.

    Returns:
        0-based block -> alpha_l * c_l, float32 `[d_model]`.

    Raises:
        TrimtabError: another operation, site or scope; strength 0.
    """
    facts = (
        ("operation", vector.operation, "add"),
        ("site", vector.site, "resid_post"),
        ("scope", str(vector.scope), "all"),
    )
    for what, has, holds in facts:
        if has != holds:
            raise TrimtabError(
                asked=f"to export {vector.label} to {form}",
                found=f"{what} {has}; {form} holds only {what} {holds}",
                advice="steer with the hook, or measure the vector again with "
                f"vector.select({what}={holds!r})",
            )
    not_zero(vector, form)
    return {
        layer: (vector.directions[layer].double() * alpha).float()
        for layer, alpha in vector.alphas.items()
    }


def not_zero(vector: Scaled, form: str) -> None:
    """Refuse a steering that changes nothing: an exported file of it would look like one."""
    if vector.strength == 0.0:
        raise TrimtabError(
            asked=f"to export {vector.label} to {form}",
            found="strength 0, which changes nothing",
            advice="give the strength to export",
        )
