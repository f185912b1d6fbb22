"""nanoGCG 0.3.0 on the built-in model, run by `prompt_kernel.py` in nanoGCG's own environment.

It wants transformers below 5, which reads neither the config nor the tokenizer's settings of a
newer one: both are made by hand here. Reads a JSON job from the standard input, prints a JSON
result on the last line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import nanogcg
import torch
from nanogcg import gcg
from nanogcg.gcg import GCG
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load a Llama checkpoint that transformers 5 has written."""
    settings = json.loads((folder / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    for name in ("architectures", "dtype", "transformers_version", "model_type"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings, rope_theta=rope["rope_theta"]))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: x.float() for name, x in weights.items()})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="<end>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    # The tokenizer adds no first token by itself, as nanoGCG takes one with a bos token to do: the
    # template writes it as text instead.
    template = (folder / "chat_template.jinja").read_text()
    tokenizer.chat_template = template.replace("{{ bos_token }}", "<s>")
    return model.eval(), tokenizer


def main() -> None:
    """Run one search and say how the loss fell over time."""
    job = json.loads(sys.stdin.read())
    torch.set_num_threads(job["threads"])
    model, tokenizer = load(Path(job["model"]))
    config = nanogcg.GCGConfig(**job["config"], verbosity="ERROR")
    scored: list[int] = []
    different: list[int] = []
    cpu_moments: list[float] = []
    score, keep = GCG._compute_candidates_loss_original, gcg.filter_ids

    def counted(self: GCG, size: int, embeds: torch.Tensor) -> torch.Tensor:
        scored.append(embeds.shape[0])
        found = score(self, size, embeds)
        cpu_moments.append(time.process_time() - cpu)
        return found

    def kept(ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
        found = keep(ids, tokenizer)
        different.append(len({tuple(row) for row in found.tolist()}))
        return found

    # Wrapped for their counts; they do what they did. Banned tokens are the caller's, so that both
    # sides search the same space: nanoGCG alone would use the chat's role tokens.
    GCG._compute_candidates_loss_original, gcg.filter_ids = counted, kept
    gcg.get_nonascii_toks = lambda tokenizer, device="cpu": torch.tensor(job["banned"])
    calls = [0]
    model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    cpu, started = time.process_time(), time.perf_counter()
    result = nanogcg.run(model, tokenizer, job["messages"], job["target"], config)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu,
                "losses": result.losses,
                "cpu_moments": cpu_moments,
                "scored": sum(scored),
                "different": sum(different),
                "calls": calls[0],
                "best_loss": result.best_loss,
                "best_ids": tokenizer(result.best_string, add_special_tokens=False)["input_ids"],
            }
        )
    )


if __name__ == "__main__":
    main()
