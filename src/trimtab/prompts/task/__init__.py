"""What a search is about: requests, references, rows, constraints."""
