"""Parts of a behavior's geometry: Jacobians, positions, linearity, functional rank, one push for all."""
