"""How Harbor is made: its world of conversations, its trainer, its files and its acceptance table."""
