"""Which edges carry a steering: the graph, both runs recorded, circuits run, and edges patched."""
