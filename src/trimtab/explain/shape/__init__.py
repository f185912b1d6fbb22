"""Parts of a behaviour's geometry: Jacobians, positions, linearity, functional rank, one push for all."""
