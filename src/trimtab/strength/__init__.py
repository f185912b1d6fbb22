"""How hard to pull: sweeps, and a strength chosen by measurement."""
