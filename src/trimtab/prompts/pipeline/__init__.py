"""The parts of a prompt search: stages, baselines, restarts, what came out."""
