"""Harbor, the built-in model: its language, its judge, its weights and its behaviors."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Return the folder that holds Harbor's weights, tokenizer and model card."""
    return Path(__file__).parent / "model"
