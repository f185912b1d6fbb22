"""Loads a model by the name that a user gives: built in, a folder, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from trimtab.errors import TrimtabError
from trimtab.models import generation
from trimtab.models.checked_weights import load_weights
from trimtab.models.model import LanguageModel, Source
from trimtab.models.names import built_in


def load(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | dict[str, int | str] | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model and its tokenizer from safetensors.

    Args:
        name_or_path: "smollm2" (a small chat model, fetched once), "harbor" (the built-in toy), a
            folder, or a hub id.
        revision: Branch, tag or commit of a hub repository.
        dtype: Of the weights; that of the checkpoint by default.
        device_map: As in transformers ("auto", "cuda"); the CPU by default.
        trust_remote_code: Run code that comes with the checkpoint. Off unless asked for.

    Raises:
        TrimtabError: There is no such model, it cannot be loaded safely, or tensors are missing.
    """
    name = os.fspath(name_or_path)
    source = str(built_in(name) or os.path.expanduser(name))
    if _looks_like_path(source) and not Path(source).is_dir():
        raise TrimtabError(
            f"the model {name!r}", "no such folder", "give a folder with config.json, or a hub id"
        )
    common: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        with generation.quiet():
            config = AutoConfig.from_pretrained(source, **common)
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
        model = load_weights(
            source,
            name,
            config=config,
            dtype="auto" if dtype is None else dtype,
            device_map=device_map,
            **common,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrimtabError(
            f"the model {name!r}",
            f"it cannot be loaded: {reason}",
            "check the name, the network, and that it is a causal language model in safetensors",
        ) from error
    lm = LanguageModel(model, tokenizer, name)
    kind = str(model.dtype).removeprefix("torch.")
    lm.source = Source(source, revision, kind, device_map, trust_remote_code)
    return lm


def _looks_like_path(name: str) -> bool:
    """A hub id is "name" or "owner/name"; anything else is a folder."""
    return name.count("/") > 1 or name.startswith((".", "/")) or (os.sep != "/" and os.sep in name)
