"""One lever made from another, with what is lost."""
