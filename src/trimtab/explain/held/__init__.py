"""Two lanes of one batch, steered and not, and parts of the network held from one to the other."""
