"""The laws of Trimtab, for every lever, method and architecture."""
