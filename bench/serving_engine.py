"""Run by an interpreter that has vLLM: one engine that answers batches when it is told to.

Reads from argv[1] {"model": folder, "new_tokens": n, "max_model_len": n, "port": n}, connects to
that port of this machine and then reads lines of JSON, {"prompts": [[id]], "steer": value or null};
answers each with {"wall": s, "cpu": s, "tokens": [[id]]}. `cpu` is the time on the processor of the
engine's processes together, which other work on the machine disturbs less.
"""

import importlib
import json
import os
import socket
import sys
import time
from pathlib import Path


def processor_time(psutil):
    """Seconds that this process and those below it have had; Linux names their clocks so."""
    own = psutil.Process()
    pids = [own.pid, *(child.pid for child in own.children(recursive=True))]
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def main() -> None:
    vllm = importlib.import_module("vllm")
    psutil = importlib.import_module("psutil")
    asked = json.loads(Path(sys.argv[1]).read_text())
    engine = vllm.LLM(
        model=asked["model"],
        dtype="float32",
        max_model_len=asked["max_model_len"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    common = {"temperature": 0.0, "max_tokens": asked["new_tokens"], "ignore_eos": True}
    connection = socket.create_connection(("127.0.0.1", asked["port"]))
    # The process that times has its own standard output, and vLLM writes to this one's.
    lines = connection.makefile("rw")
    lines.write(json.dumps({"name": os.environ["ENGINE"]}) + "\n")
    lines.flush()
    for line in lines:
        job = json.loads(line)
        extra = None if job["steer"] is None else {"steer": job["steer"]}
        params = vllm.SamplingParams(**common, detokenize=False, extra_args=extra)
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        wall, cpu = time.perf_counter(), processor_time(psutil)
        answers = engine.generate(prompts, params, use_tqdm=False)
        wall, cpu = time.perf_counter() - wall, processor_time(psutil) - cpu
        tokens = [list(answer.outputs[0].token_ids) for answer in answers]
        lines.write(json.dumps({"wall": wall, "cpu": cpu, "tokens": tokens}) + "\n")
        lines.flush()


if __name__ == "__main__":
    main()
