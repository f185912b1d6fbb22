"""Run by the interpreter that has vLLM: greedy tokens of a server with Trimtab's plugin.

Reads from argv[1] {"jobs": [{"model": folder, "folder": steering files, "eager": bool, "options": {},
"rounds": [[{"ids": [id], "steer": value or null}]]}], "max_new_tokens": n, "max_model_len": n};
a round is one batch. Writes to argv[2] one list a job, of one list a round, of {"answer": [id],
"cached": tokens found in the prefix cache, "logprob": of the first token} or {"refused": message}.
The engines run in this process, one after another.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    asked = json.loads(Path(sys.argv[1]).read_text())
    found = []
    for job in asked["jobs"]:
        os.environ["TRIMTAB_STEER"] = job["folder"]
        vllm = importlib.import_module("vllm")
        parallel = importlib.import_module("vllm.distributed")
        model = vllm.LLM(
            model=job["model"],
            dtype="float32",
            enforce_eager=job["eager"],
            max_model_len=asked["max_model_len"],
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            **job["options"],
        )
        answers = [
            one_round(vllm, model, requests, asked["max_new_tokens"]) for requests in job["rounds"]
        ]
        mode = model.llm_engine.vllm_config.compilation_config.mode
        found.append({"rounds": answers, "compilation": int(mode)})
        del model
        gc.collect()
        parallel.cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(found))


def one_round(vllm, model, requests, new):
    """Every request in one batch; a refused one is asked alone, as its refusal is an exception."""
    common = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True, "detokenize": False}
    params = [
        vllm.SamplingParams(
            **common,
            logprobs=0,
            extra_args=None if each["steer"] is None else {"steer": each["steer"]},
        )
        for each in requests
    ]
    prompts = [{"prompt_token_ids": each["ids"]} for each in requests]
    if len(requests) == 1:
        try:
            answers = model.generate(prompts, params, use_tqdm=False)
        except vllm.exceptions.VLLMValidationError as error:
            return [{"refused": str(error)}]
    else:
        answers = model.generate(prompts, params, use_tqdm=False)
    return [
        {
            "answer": list(answer.outputs[0].token_ids),
            "cached": answer.num_cached_tokens,
            "logprob": answer.outputs[0].logprobs[0][answer.outputs[0].token_ids[0]].logprob,
        }
        for answer in answers
    ]


if __name__ == "__main__":
    main()
