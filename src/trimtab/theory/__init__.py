"""What pushing along a direction does in theory: tilting, peaks, collapse."""
