"""Publishing a folder on the model hub, with the card that lies in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from trimtab.errors import TrimtabError

CARD = "README.md"
# Weights, configuration, tokenizer and card: no code, no pickles, nothing half-written.
_PATTERNS = (
    *("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt", "*.csv", "*.md"),
    *("LICENSE*", "NOTICE*"),
)


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    api: Any | None = None,
    private: bool | None = None,
    message: str = "Upload a steered model",
) -> str:
    """Upload a baked checkpoint or an adapter as one commit; return the commit's address.

    Args:
        folder: holds a `README.md`, the card; only weights, configuration, tokenizer and text go.
        repo_id: `user/name` on the hub; created when it is not there.
        api: stands for the hub with its `create_repo` and `upload_folder`;
            `huggingface_hub.HfApi()` with the user's own login by default.
        private: of a repository that is created; the hub's own default when None.
        message: of the commit.

    Raises:
        TrimtabError: no such folder, no card in it, or the hub refuses.
    """
    source = Path(folder)
    if not (source / CARD).is_file():
        raise TrimtabError(
            asked=f"to push {source} to {repo_id}",
            found=f"no {CARD} in it" if source.is_dir() else "no such folder",
            advice="push a folder that `trimtab bake` or `trimtab export --to peft` wrote",
        )
    hub = HfApi() if api is None else api
    try:
        hub.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=source,
            repo_type="model",
            commit_message=message,
            allow_patterns=list(_PATTERNS),
            ignore_patterns=[".*"],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise TrimtabError(
            asked=f"to push {source} to {repo_id}",
            found=(str(error).strip() or type(error).__name__).splitlines()[0],
            advice="check the name, the network and the login (`hf auth login`)",
        ) from error
    return str(getattr(commit, "commit_url", commit))
