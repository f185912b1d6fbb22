"""How wide a behavior's margin is: gaps, first tokens, radii and what it costs to close them."""
