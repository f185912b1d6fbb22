"""What is to change: the value, its files, its splits."""

from pathlib import Path

BUILT_IN = Path(__file__).parent.parent / "harbor" / "behaviors"  # plain data: nothing is imported


def built_in_names() -> list[str]:
    """Return the names of the built-in behaviors."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
