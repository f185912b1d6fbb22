"""Ways from a soft slot to allowed tokens, one a file; `trimtab.prompts.project` runs them."""
