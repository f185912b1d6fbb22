"""Ways from a soft slot to allowed tokens, one a file; `trimtab.prompts.projections.project` runs them."""
