"""Run by the interpreter that has vLLM: greedy tokens of stock vLLM for prompts given as ids.

Reads from argv[1] {"model": folder, "prompts": [[id]], "max_new_tokens": n}; writes to argv[2].
"""

import importlib
import json
import sys
from pathlib import Path


def main() -> None:
    vllm = importlib.import_module("vllm")
    asked = json.loads(Path(sys.argv[1]).read_text())
    model = vllm.LLM(
        model=asked["model"],
        dtype="float32",
        enforce_eager=asked["enforce_eager"],
        max_model_len=asked["max_model_len"],
        skip_tokenizer_init=True,
        # So that a result says what one prompt gives, whatever ran before it.
        enable_prefix_caching=False,
    )
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=asked["max_new_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    answers = model.generate(prompts, sampling, use_tqdm=False)
    Path(sys.argv[2]).write_text(json.dumps([list(a.outputs[0].token_ids) for a in answers]))


if __name__ == "__main__":
    main()
