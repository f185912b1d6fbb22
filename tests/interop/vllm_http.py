"""Run by the interpreter that has vLLM: `trimtab serve`, asked by the OpenAI client.

Reads from argv[1] {"folder": steering files, "arguments": [of vllm serve], "completions": [{"ids":
[id], "steer": value or null}], "chats": [{"text": str, "steer": value or null}], "wrong": [value],
"max_new_tokens": n}; writes to argv[2] {"completions": [[id]], "chats": [[id]], "wrong": [[status,
message, of a stream too]], "beams": status, "after": [id]}. All of a kind are asked at once.
"""

import concurrent.futures
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PATIENCE = 600


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trimtab", "serve", "harbor", "--steer", asked["folder"]]
    command += ["--port", str(port), "--host", "127.0.0.1", *asked["arguments"]]
    with open("server.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait(server, port)
            found = converse(asked, port)
            found["lives"] = server.poll() is None
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
    Path(sys.argv[2]).write_text(json.dumps(found))


def wait(server, port):
    for _ in range(PATIENCE):
        if server.poll() is not None:
            raise RuntimeError(Path("server.log").read_text()[-4000:])
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise TimeoutError(Path("server.log").read_text()[-4000:])


def converse(asked, port):
    openai = importlib.import_module("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    common = {"model": "harbor", "temperature": 0.0, "max_tokens": asked["max_new_tokens"]}

    def body(steer):
        given = {} if steer is None else {"vllm_xargs": {"steer": steer}}
        return {"ignore_eos": True, "return_token_ids": True, **given}

    def complete(each, **more):
        return client.completions.create(
            prompt=each["ids"], extra_body=body(each["steer"]), **common, **more
        )

    def chat(each):
        messages = [{"role": "user", "content": each["text"]}]
        answer = client.chat.completions.create(
            messages=messages, extra_body=body(each["steer"]), **common
        )
        return answer.choices[0].token_ids

    def refused(ask, *args, **kwargs):
        try:
            for _ in ask(*args, **kwargs):
                pass
        except openai.APIStatusError as error:
            return [error.status_code, str(error)]
        return [200, ""]

    first = asked["completions"][0]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        completions = list(pool.map(complete, asked["completions"]))
        chats = list(pool.map(chat, asked["chats"]))
    wrong = []
    for value in asked["wrong"]:
        bad = first | {"steer": value}
        wrong.append([*refused(complete, bad), *refused(complete, bad, stream=True)])
    misspelt = {"vllm_xargs": {"steering": "mood:1"}}
    beams = {"vllm_xargs": {"steer": "mood:1"}, "use_beam_search": True}
    create = client.completions.create
    return {
        "completions": [answer.choices[0].token_ids for answer in completions],
        "chats": chats,
        "wrong": wrong,
        "misspelt": refused(create, prompt=first["ids"], extra_body=misspelt, **common),
        "beams": refused(create, prompt=first["ids"], extra_body=beams, n=2, **common),
        "after": complete(asked["completions"][1]).choices[0].token_ids,
    }


if __name__ == "__main__":
    main()
