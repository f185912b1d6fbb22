"""What the discrete searches share: a descent and its diary, a buffer, repair of a start."""
