"""What a push becomes in each head, and what it says through the vocabulary."""
