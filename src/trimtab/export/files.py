"""What the exporters share: refusals by name."""

from __future__ import annotations

from trimtab.errors import TrimtabError
from trimtab.steering.weights import Scaled


def refusal(lever: Scaled, form: str, found: str, advice: str) -> TrimtabError:
    """Make the error of a lever that a format cannot hold."""
    return TrimtabError(asked=f"to export {lever.label} to {form}", found=found, advice=advice)


def not_zero(lever: Scaled, form: str) -> None:
    """Refuse a steering that changes nothing: an exported file of it would look like one."""
    if lever.strength == 0.0:
        raise refusal(
            lever, form, "strength 0, which changes nothing", "give the strength to export"
        )
