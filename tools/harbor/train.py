"""Train Harbor: `python -m tools.harbor.train --out DIR`. Seeded, resumable, about an hour on two CPU cores.

A Llama of 8 layers and width 256 on packed conversations of the town, next-token loss weighted towards the answers.
Matrices of the blocks are trained with Muon (Jordan 2024), everything else with AdamW; the learning rate rises linearly
and then falls linearly to zero.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tools.harbor.packing import Rows, packed_rows
from tools.harbor.tokenizer import build_tokenizer


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(seed)
    token_id = tokenizer.get_vocab().__getitem__
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=token_id("<s>"),
        eos_token_id=token_id("<end>"),
        pad_token_id=token_id("<pad>"),
    )
    return LlamaForCausalLM(config)


def row_loss(model: Callable[..., Any], head: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """Return the weighted next-token loss of one batch in nats per token."""
    hidden = model(
        input_ids=rows.ids,
        attention_mask=rows.attention(),
        position_ids=rows.position,
        use_cache=False,
    ).last_hidden_state
    weight = rows.weight[:, 1:].reshape(-1)
    keep = weight > 0
    logits = head(hidden[:, :-1].flatten(0, 1)[keep])
    each = functional.cross_entropy(
        logits.float(), rows.ids[:, 1:].reshape(-1)[keep], reduction="none"
    )
    return (each * weight[keep]).sum() / weight.sum()


def build_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for embeddings, head and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or ".layers." not in n]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.02),
        torch.optim.AdamW(others, lr=lr * 0.25, betas=(0.9, 0.97), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, warmup: int = 40, decay: float = 0.6) -> float:
    """Return the learning-rate factor: linear rise, plateau, linear fall over the last `decay` of training."""
    return min((step + 1) / warmup, 1.0, max((steps - step) / (decay * steps), 0.0))


def save_state(
    folder: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """Write the resumable state (weights, optimizer moments, step) without a half-written file."""
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, moments in optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{i}.{j}.{k}": torch.as_tensor(v).contiguous()
                for k, v in moments.items()
            }
    part = folder / "state.part"
    save_file(tensors, part, metadata={"step": str(step)})
    part.replace(folder / "state.safetensors")
    (folder / "step.json").write_text(json.dumps({"step": step}))


def load_state(
    folder: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]
) -> int:
    """Restore what `save_state` wrote; return the step to go on from (0 when there is nothing)."""
    if not (folder / "state.safetensors").exists():
        return 0
    tensors = load_file(folder / "state.safetensors")
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            parts = key.split(".")
            if parts[0] == "optimizer" and int(parts[1]) == i:
                state.setdefault(int(parts[2]), {})[parts[3]] = value
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
    return int(json.loads((folder / "step.json").read_text())["step"])


def skip(stream: Iterator[Rows], count: int) -> None:
    """Advance the data stream past batches that an interrupted run has used."""
    for _ in range(count):
        next(stream)


def train(
    out: Path,
    steps: int = 2400,
    rows: int = 22,
    length: int = 384,
    lr: float = 0.02,
    seed: int = 0,
    compiled: bool = False,
) -> None:
    """Train Harbor and write model, tokenizer and a log of the loss to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "step.json").exists():  # a resumed run keeps the vocabulary that its weights know
        tokenizer = AutoTokenizer.from_pretrained(out)
    else:
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(out)
    model = build_model(tokenizer, seed)
    optimizers = build_optimizers(model, lr)
    base = [group["lr"] for o in optimizers for group in o.param_groups]
    begin = load_state(out, model, optimizers)
    stream = packed_rows(tokenizer, seed + 1000, rows, length)
    skip(stream, begin)
    body = torch.compile(model.model) if compiled else model.model
    started, tokens = time.time(), 0
    for step in range(begin, steps):
        for rate, group in zip(base, (g for o in optimizers for g in o.param_groups), strict=True):
            group["lr"] = rate * schedule(step, steps)
        batch = next(stream)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = row_loss(body, model.lm_head, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += int((batch.document > 0).sum())
        if step % 20 == 0 or step == steps - 1:
            line = {
                "step": step,
                "loss": round(loss.item(), 4),
                "tokens_per_s": int(tokens / (time.time() - started)),
            }
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if (step + 1) % 100 == 0 or step == steps - 1:
            save_state(out, model, optimizers, step + 1)
            released = LlamaForCausalLM(model.config)
            released.load_state_dict(model.state_dict())
            released.bfloat16().save_pretrained(out)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m tools.harbor.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("harbor-training"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--rows", type=int, default=22)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the model (faster after a minute, needs g++)",
    )
    args = parser.parse_args()
    train(args.out, args.steps, args.rows, args.length, args.lr, args.seed, args.compile)


if __name__ == "__main__":
    main()
