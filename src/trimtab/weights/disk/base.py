"""The model to bake into: a folder on disk, or a model in memory that is saved to one first."""

from __future__ import annotations

import os
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.models.model import LanguageModel
from trimtab.models.names import built_in

Model = LanguageModel | str | os.PathLike[str]
_SHARDS = "4GB"
# What a checkpoint of safetensors consists of; nothing that holds code or pickles.
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")


def folder_of(model: Model, spare: Path) -> tuple[Path, str]:
    """Return the folder of a model's files, and its name for others to read.

    The files of a hub id are downloaded if they are not there; a model in memory is saved to `spare`.

    Raises:
        TrimtabError: there is no such model, or it cannot be saved.
    """
    if isinstance(model, LanguageModel):
        save_model(model, spare)
        return spare, public_name(model.name or "a model without a name")
    name = os.fspath(model)
    if known := built_in(name):
        return known, name
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder, folder.resolve().name
    if _is_path(name):
        raise TrimtabError(
            f"the model {name!r}", "no such folder", "give a folder with config.json, or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED))), name
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrimtabError(
            f"the model {name!r}",
            f"it cannot be fetched: {reason}",
            "check the name and the network, or give a folder",
        ) from error


def public_name(name: str) -> str:
    """Return a model's name for others to read: without the folders of the maker's machine."""
    return Path(name).name if _is_path(name) else name


def _is_path(name: str) -> bool:
    return name.count("/") > 1 or name.startswith((".", "/", "~"))


def save_model(lm: LanguageModel, folder: Path) -> None:
    """Save a model that is in memory as a checkpoint, as it is now.

    Raises:
        TrimtabError: quantized or offloaded weights, or a generation configuration that contradicts
            itself.
        OSError: the disk is full.
    """
    asked = f"to bake into architecture {type(lm.model).__name__}"
    if getattr(lm.model.config, "quantization_config", None) is not None:
        raise TrimtabError(
            asked, "quantized weights", "bake into the unquantized model and quantize the result"
        )
    if any(tensor.is_meta for tensor in lm.model.state_dict().values()):
        raise TrimtabError(
            asked,
            "weights that are not in memory (offloaded)",
            "give the model's folder instead of the loaded model",
        )
    config = lm.model.config
    before = dict(vars(config))
    try:
        lm.model.save_pretrained(folder, max_shard_size=_SHARDS)
    except ValueError as error:  # transformers on a generation config that contradicts itself
        raise TrimtabError(
            asked=f"to save {lm.name or 'the model'} with its generation config",
            found=str(error),
            advice="correct lm.model.generation_config",
        ) from error
    finally:
        # Saving notes the class and dtype in the live configuration; it is left as it was.
        vars(config).clear()
        vars(config).update(before)
    lm.tokenizer.save_pretrained(folder)
