"""What is to change: the value, its files, its splits."""
