"""What pushing along a direction does in theory: tilting, peaks, collapse, and a model to try it on."""
