"""Run by the interpreter that has vLLM: greedy tokens of stock vLLM for prompts given as ids.

Reads from argv[1] {"jobs": [{"model": folder, "prompts": [[id]], "eager": bool, "options": {}}],
"max_new_tokens": n, "max_model_len": n}; writes to argv[2] a list of {"answers": [[id]],
"compilation": mode}, one a job. The engines run in this process, one after another.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    vllm = importlib.import_module("vllm")
    parallel = importlib.import_module("vllm.distributed")
    asked = json.loads(Path(sys.argv[1]).read_text())
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=asked["max_new_tokens"], ignore_eos=True, detokenize=False
    )
    found = []
    for job in asked["jobs"]:
        model = vllm.LLM(
            model=job["model"],
            dtype="float32",
            enforce_eager=job["eager"],
            max_model_len=asked["max_model_len"],
            skip_tokenizer_init=True,
            # So that a result says what one prompt gives, whatever ran before it.
            enable_prefix_caching=False,
            **job["options"],
        )
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        answers = model.generate(prompts, sampling, use_tqdm=False)
        mode = model.llm_engine.vllm_config.compilation_config.mode
        ids = [list(answer.outputs[0].token_ids) for answer in answers]
        found.append({"answers": ids, "compilation": int(mode)})
        del model
        gc.collect()
        parallel.cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
