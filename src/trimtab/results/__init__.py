"""How a figure is bounded, shown and kept."""
