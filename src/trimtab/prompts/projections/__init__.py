"""Ways from a soft slot to allowed tokens, one a file; `trimtab.prompts.projections.project` runs them."""

from trimtab.prompts.projections import lattice, mixture, straight_through

__all__ = ["lattice", "mixture", "straight_through"]
