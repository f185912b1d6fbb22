"""Publishing, against a stand-in that records the calls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from trimtab.errors import TrimtabError
from trimtab.export import push, write_peft
from trimtab.steering.vector import VectorSteering


class Stand:
    """The hub's two calls: checks names as the hub's client does and keeps what would be sent."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.calls: list[str] = []
        self.how: dict[str, Any] = {}
        self.sent: list[str] = []
        self.fails = fails

    def create_repo(self, repo_id: str, **how: Any) -> object:
        validate_repo_id(repo_id)
        self.calls.append(f"create {repo_id}")
        self.how = how
        return None

    def upload_folder(self, *, repo_id: str, folder_path: str | Path, **how: Any) -> object:
        self.calls.append(f"upload {repo_id}: {how['commit_message']}")
        if self.fails is not None:
            raise self.fails
        files = [
            str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()
        ]
        kept = filter_repo_objects(
            files, allow_patterns=how["allow_patterns"], ignore_patterns=how["ignore_patterns"]
        )
        self.sent = sorted(kept)
        return SimpleNamespace(commit_url=f"https://hub.invalid/{repo_id}/commit/1")


@pytest.fixture
def folder(tmp_path, llama) -> Path:
    c = [1.0] + [0.0] * (llama.d_model - 1)
    return write_peft(llama, VectorSteering.from_directions(llama, {1: c}), tmp_path / "adapter")


def test_one_commit_with_the_card(folder):
    for name in ("code.py", "weights.bin", "weights.pt", ".hidden.json"):
        (folder / name).write_text("x")
    hub = Stand()
    address = push(folder, "me/steered", api=hub, message="First")
    assert address == "https://hub.invalid/me/steered/commit/1"
    assert hub.calls == ["create me/steered", "upload me/steered: First"]
    assert hub.sent == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert hub.how == {"repo_type": "model", "private": None, "exist_ok": True}


def test_the_real_client_has_these_calls():
    import inspect

    hub = HfApi()
    for call, names in (
        (hub.create_repo, ["repo_type", "private", "exist_ok"]),
        (
            hub.upload_folder,
            [
                "repo_id",
                "folder_path",
                "repo_type",
                "commit_message",
                "allow_patterns",
                "ignore_patterns",
            ],
        ),
    ):
        assert set(names) <= set(inspect.signature(call).parameters)


def test_refusals(folder, tmp_path):
    with pytest.raises(TrimtabError, match="no such folder"):
        push(tmp_path / "none", "me/steered", api=Stand())
    with pytest.raises(TrimtabError, match="no README.md"):
        (tmp_path / "bare").mkdir()
        push(tmp_path / "bare", "me/steered", api=Stand())
    with pytest.raises(TrimtabError, match="me/steered/x"):
        push(folder, "me/steered/x", api=Stand())
    with pytest.raises(TrimtabError, match="connection refused"):
        push(folder, "me/steered", api=Stand(ConnectionError("connection refused")))
