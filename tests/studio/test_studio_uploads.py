"""The browser app takes as a file only what was uploaded to it, whatever path a client posts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from starlette.testclient import TestClient

import planted
from trimtab.studio import app as studio_app
from trimtab.studio.uploads import Page
from trimtab.studio.workshop import Limits, Workshop

SECRET = "abc123"
BEHAVIOR = """
toward: [the ferry, the pier, the boat, the sea]
away: [a ferry, a pier, a boat, a sea]
judge: {kind: phrases, toward: [Z], away: [Q]}
"""
REFUSED = "not uploaded to this app"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Gradio keeps uploads; a file of the server lies beside it and in its working folder."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(studio_app, "STAY_SECONDS", 0)
    monkeypatch.chdir(tmp_path)
    for name in ("x.yaml", "x.safetensors"):
        (tmp_path / name).write_text(f"token: {SECRET}")
    return tmp_path / "cache"


@pytest.fixture
def web(cache: Path, tmp_path: Path) -> Iterator[TestClient]:
    limits = Limits(answer_tokens=2, gauge_prompts=1, tune_prompts=1)
    (tmp_path / "made").mkdir()
    app = studio_app.application(Workshop(planted.language_model(), limits), tmp_path / "made")
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def posted(path: object, **more: object) -> dict[str, object]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}


def upload(web: TestClient, name: str, content: bytes) -> str:
    (path,) = web.post("/gradio_api/upload", files={"files": (name, content)}).json()
    return path


def events(web: TestClient) -> dict[int, list[dict[str, Any]]]:
    """Every event of the page and the components of its inputs, as its clients are told."""
    config = web.get("/config").json()
    components = {each["id"]: each for each in config["components"]}
    return {
        each["id"]: [components[i] for i in each["inputs"]]
        for each in config["dependencies"]
        if each["backend_fn"]
    }


def placed(web: TestClient, value: object, kinds: set[str]) -> dict[tuple[int, int], list[Any]]:
    """Each event and place of an input of these kinds -> all inputs, with this value there."""
    return {
        (event, place): [value if c is into else c["props"].get("value") for c in components]
        for event, components in events(web).items()
        for place, into in enumerate(components)
        if into["type"] in kinds
    }


def kinds_of_inputs(web: TestClient) -> set[str]:
    return {each["type"] for components in events(web).values() for each in components}


def ask(web: TestClient, requests: dict[Any, Any], session: str) -> dict[Any, dict[str, Any]]:
    """Post requests, (event, ...) -> inputs, and return what came of each."""
    asked = {}
    for key, data in requests.items():
        body = {"data": data, "fn_index": key[0], "session_hash": session}
        answer = web.post("/gradio_api/queue/join", json=body)
        asked[answer.json()["event_id"]] = key
    lines = web.get(f"/gradio_api/queue/data?session_hash={session}").text.splitlines()
    said = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    ends = [each for each in said if each["msg"] == "process_completed"]
    return {asked[each["event_id"]]: each for each in ends}


def test_a_path_that_was_not_uploaded_is_refused_by_every_event(
    web: TestClient, cache: Path, tmp_path: Path
) -> None:
    mine = Path(upload(web, "mine.yaml", BEHAVIOR.encode()))
    other = cache / "another-app" / "x.yaml"
    other.parent.mkdir()
    other.write_text(f"token: {SECRET}")
    (mine.parent / "link.yaml").symlink_to(tmp_path / "x.yaml")
    (mine.parent / "in.yaml").symlink_to(mine)
    server = tmp_path / "x.yaml"
    values: list[Any] = [
        posted(server),
        {"value": {"deep": [[posted(server)]]}},
        *(posted(path) for path in ("x.yaml", "./x.yaml", tmp_path / "x.safetensors")),
        *(posted(f"{base}/../x.yaml") for base in (cache, tmp_path / "cache" / ".." / "cache")),
        posted(f"{mine.parent}/../../x.yaml"),
        *(posted(mine.parent / name) for name in ("link.yaml", "in.yaml", "", "..")),
        *(posted(f"{scheme}{server}") for scheme in ("file://", "file:", "http://127.0.0.1:9")),
        posted(f"https://127.0.0.1:9{server}", url=f"https://127.0.0.1:9{server}"),
        posted(other),
        *(posted(path) for path in ("", "/", f"{server}\0", "~/x.yaml", f"{cache}/../none.yaml")),
        posted(server, url=f"http://127.0.0.1/gradio_api/file={mine}", is_stream=True),
        posted(server, url=f"file://{server}", orig_name="mine.yaml"),
        {"path": str(server)},
        [posted(mine), posted(server)],
        posted(mine, more=posted(server)),
    ]
    before = sorted(cache.rglob("*"))
    kinds, files = kinds_of_inputs(web), {"file", "uploadbutton"}
    assert files | {"state", "textbox", "dropdown", "slider"} <= kinds
    for i, value in enumerate(values):
        requests = placed(web, value, kinds if i < 2 else files)
        ends = ask(web, requests, f"s{i}")
        assert ends.keys() == requests.keys()
        for at, end in ends.items():
            assert not end["success"] and REFUSED in end["output"]["error"], (value, at, end)
        assert SECRET not in json.dumps([*ends.values()])
    assert sorted(cache.rglob("*")) == before


@pytest.mark.parametrize("check", ["gradio's", "ours"])
def test_either_check_alone_keeps_the_servers_files(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """Gradio's is of no use to a page that was not launched; ours hangs on its inner names."""

    def weaker(*args: Any) -> gr.Blocks:
        page = build(*args)
        if check == "ours":
            page.has_launched = False
        return page

    build = studio_app.build
    monkeypatch.setattr(studio_app, "build", weaker)
    if check == "gradio's":
        monkeypatch.setattr(Page, "preprocess_data", gr.Blocks.preprocess_data)
    app = studio_app.application(Workshop(planted.language_model()), tmp_path)
    with TestClient(app, base_url="http://127.0.0.1") as web:
        requests = placed(web, posted(tmp_path / "x.yaml"), kinds_of_inputs(web) - {"state"})
        ends = ask(web, requests, "s")
        assert ends.keys() == requests.keys()
        assert not any(end["success"] for end in ends.values())
        assert not [*cache.rglob("x.yaml")]


def named(web: TestClient, name: str) -> int:
    """The event of this name."""
    dependencies = web.get("/config").json()["dependencies"]
    (found,) = [each["id"] for each in dependencies if each["api_name"] == name]
    return found


def test_what_was_uploaded_is_read(web: TestClient, tmp_path: Path) -> None:
    def as_a_browser_names(path: str) -> dict[str, object]:
        url = f"http://127.0.0.1/gradio_api/file={path}"
        return posted(path, url=url, orig_name=Path(path).name, size=os.stat(path).st_size)

    file = as_a_browser_names(upload(web, "mine.yaml", BEHAVIOR.encode()))
    vector = planted.push(planted.language_model()).save(tmp_path / "push.safetensors")
    lever = as_a_browser_names(upload(web, "push.safetensors", vector.read_bytes()))
    chosen = [None, "from a file", file, "mine", *[""] * 5, "mean_difference", "toward", 0.5]
    find, opened = named(web, "find"), named(web, "open")
    ends = ask(web, {(find,): chosen, (opened,): [lever, *chosen]}, "s")
    assert len(ends) == 2
    for end in ends.values():
        assert end["success"] and "<b>mine</b>" in end["output"]["data"][1], end


def test_a_removed_upload_does_not_stand_in_the_way(web: TestClient) -> None:
    """A page goes on naming the file that was chosen when its behavior is another by now."""
    form = ["mine", "the ferry\nthe pier\nthe sea", "a ferry\na pier\na sea", "Z", "Q", ""]
    gone = Path(upload(web, "mine.yaml", b"a")).with_name("gone.yaml")
    rest = [posted(gone), *form, "mean_difference", "toward", 0.5]
    find, told = named(web, "find"), {}
    for source in ("write my own", "from a file"):
        (end,) = ask(web, {(find,): [None, source, *rest]}, source).values()
        told[source] = end["output"]["data"][1]
    assert "<b>mine</b>" in told["write my own"] and "no such file" in told["from a file"]


def test_the_runners_token_is_at_nobodys_service(
    web: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert web.get("/gradio_api/run-history/buckets").status_code == 404
    assert web.post("/gradio_api/run-history/connect", json={}).status_code in (404, 405)
