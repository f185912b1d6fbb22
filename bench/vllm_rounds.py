"""Run by an interpreter that has vLLM: times of each round, of several checkpoints in turn.

Reads from argv[1] {"models": {name: folder}, "prompt": [id], "batches": [n], "new_tokens": n,
"repeats": n}; writes [{name: {"wall": [s], "cpu": [s]}}], one a batch, to argv[2].
Each engine has processes of its own, which sleep while the others work; `cpu` is its worker's time
on the processor, which other work on the machine disturbs less.
"""

import importlib
import json
import sys
import time
from pathlib import Path

WARM = 5


def workers() -> set[int]:
    """The processes below this one that have none below them; an engine's core only waits."""
    psutil = importlib.import_module("psutil")
    below = psutil.Process().children(recursive=True)
    return {child.pid for child in below if not child.children()}


def processor_time(pids: set[int]) -> float:
    """Seconds that processes have had; Linux makes a process's clock from its number so."""
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def main() -> None:
    vllm = importlib.import_module("vllm")
    asked = json.loads(Path(sys.argv[1]).read_text())
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False
    )
    engines, pids = {}, {}
    for name, folder in asked["models"].items():
        before = workers()
        engines[name] = vllm.LLM(
            model=folder,
            dtype="float32",
            max_model_len=256,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
        )
        pids[name] = workers() - before
    found = []
    for batch in asked["batches"]:
        prompts = [{"prompt_token_ids": asked["prompt"]}] * batch
        times = {name: {"wall": [], "cpu": []} for name in engines}
        names = list(engines)
        for round_ in range(asked["repeats"] + WARM):
            turn = round_ % len(names)
            for name in names[turn:] + names[:turn]:
                wall, cpu = time.perf_counter(), processor_time(pids[name])
                engines[name].generate(prompts, sampling, use_tqdm=False)
                if round_ >= WARM:
                    times[name]["wall"].append(time.perf_counter() - wall)
                    times[name]["cpu"].append(processor_time(pids[name]) - cpu)
        found.append(times)
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
