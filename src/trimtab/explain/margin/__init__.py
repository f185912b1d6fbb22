"""How wide a behaviour's margin is: gaps, first tokens, radii and what it costs to close them."""
