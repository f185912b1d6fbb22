"""How the kernel scores cheaply: what is shared, fed, raced, drafted and remembered."""
