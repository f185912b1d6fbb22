"""Inspect on a baked checkpoint counts what we count, and passes a request's steering on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from interop.programs import interpreter
from tools.harbor.questions import questions, write_task
from trimtab import behavior, find, load

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "inspect_harbor.py"
LIMIT = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_task(tmp_path)
    shutil.copy(EXAMPLE, tmp_path)
    return tmp_path


def evaluated(folder: Path, *words: str) -> dict[str, Any]:
    """The log of `inspect eval`."""
    program = interpreter("inspect").with_name("inspect")
    common = ["--limit", str(LIMIT), "--display", "none", "--log-dir", "logs", "--log-format"]
    done = subprocess.run(
        [program, "eval", EXAMPLE.name, *words, *common, "json"],
        cwd=folder,
        # Nothing of ours: a baked checkpoint and an HTTP request need no Trimtab.
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = (folder / "logs").glob("*.json")
    log = json.loads(path.read_text())
    assert log["status"] == "success", log.get("error")
    return log


def accuracy(log: dict[str, Any]) -> float:
    return log["results"]["scores"][0]["metrics"]["accuracy"]["value"]


def test_a_baked_checkpoint(folder, record_property):
    lm = load("harbor", dtype=torch.float32)
    lies = find(lm, behavior("truth")).select(scope="all").at(-4.0)
    lies.bake(folder / "baked", lm)
    documents = questions()[:LIMIT]
    with lies.on(lm):
        answers = lm.generate([str(each["question"]) for each in documents], max_new_tokens=40)
    right = [
        str(each["value"]).lower() in answer.lower()
        for each, answer in zip(documents, answers, strict=True)
    ]
    log = evaluated(
        folder, "--model", "hf/local", "-M", "model_path=baked", "-M", "do_sample=false"
    )
    said = {sample["id"]: sample["output"]["choices"][0]["message"] for sample in log["samples"]}
    same = [
        said[number]["content"].strip() == answer.strip()
        for number, answer in enumerate(answers, 1)
    ]
    record_property(
        "inspect",
        f"accuracy {accuracy(log):.3f}, ours {sum(right) / LIMIT:.3f}; "
        f"equal answers {sum(same)} of {LIMIT}",
    )
    assert accuracy(log) == pytest.approx(sum(right) / LIMIT)
    assert sum(same) == LIMIT and 0.3 < accuracy(log) < 0.95


class Server(BaseHTTPRequestHandler):
    """Notes what it is asked and answers like an OpenAI-compatible server."""

    asked: list[dict[str, Any]] = []

    def do_GET(self) -> None:
        self.answer({"object": "list", "data": [{"id": "harbor", "object": "model"}]})

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        message = {"role": "assistant", "content": "It is called Mara."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self.answer(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "harbor",
                "choices": [choice],
                "usage": usage,
            }
        )

    def answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_request_carries_its_steering(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        Server.asked.clear()
        log = evaluated(
            folder,
            "--model",
            "vllm/harbor",
            "--model-base-url",
            f"http://127.0.0.1:{server.server_port}/v1",
            "--extra-body",
            '{"vllm_xargs": {"steer": "lies:-6"}}',
        )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert [each["vllm_xargs"] for each in Server.asked] == [{"steer": "lies:-6"}] * LIMIT
    assert {(each["temperature"], each["max_tokens"]) for each in Server.asked} == {(0, 40)}
    expected = sum(each["value"] == "Mara" for each in questions()[:LIMIT]) / LIMIT
    assert accuracy(log) == pytest.approx(expected) and expected > 0
