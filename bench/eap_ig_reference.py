"""EAP-IG on what `eap_ig.py` hands over, run in an environment that has TransformerLens below 3.

Reads `job.json` and `model.safetensors` of a folder, answers one JSON order a line on the standard
input with one JSON line. Its "tokens" are rows of a table of streams: one row for each token of each
text without the steering, one with it. So its own code, unmodified, goes from one to the other.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SWITCHES = (
    "use_attn_result",
    "use_split_qkv_input",
    "use_hook_mlp_in",
    "ungroup_grouped_query_attention",
)


def on_processor() -> None:
    """Let it run without a GPU: it asks for its matrix of scores on `cuda`, whatever the model."""
    zeros = torch.zeros

    def elsewhere(*size: Any, **named: Any) -> Tensor:
        if named.get("device") == "cuda":
            named["device"] = "cpu"
        return zeros(*size, **named)

    torch.zeros = elsewhere


def row_tokenizer(rows: int) -> Any:
    """Text is the numbers of rows; the last row is padding, and nothing is put before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad = "<pad>"
    words = {str(i): i for i in range(rows - 1)} | {pad: rows - 1}
    core = Tokenizer(models.WordLevel(vocab=words, unk_token=pad))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("pad_token", "bos_token", "eos_token", "unk_token"), pad)
    # As if it added a first token by itself: TransformerLens loads another one otherwise.
    return PreTrainedTokenizerFast(
        tokenizer_object=core, name_or_path="rows", add_bos_token=True, **special
    )


def build(config: dict[str, Any], start: int, weights: dict[str, Tensor]) -> Any:
    """Make a HookedTransformer of a Llama's blocks from `start` on, fed by the table of rows."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    head, heads, groups = config["head_dim"], config["heads"], config["groups"]
    count, rows = config["layers"] - start, weights["rows"]
    settings = HookedTransformerConfig(
        n_layers=count,
        d_model=config["d_model"],
        n_ctx=config["context"],
        d_head=head,
        n_heads=heads,
        n_key_value_heads=groups,
        d_mlp=config["d_mlp"],
        act_fn="silu",
        d_vocab=len(rows),
        d_vocab_out=config["vocabulary"],
        eps=config["eps"],
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=head,
        rotary_base=config["rope_theta"],
        device="cpu",
        **dict.fromkeys(SWITCHES, True),
    )
    model = HookedTransformer(settings, tokenizer=row_tokenizer(len(rows)))
    # The texts begin with the row of the first token: nothing is to be put before it.
    model.cfg.tokenizer_prepends_bos = True
    state = {
        "embed.W_E": rows,
        "ln_final.w": weights["model.norm.weight"],
        "unembed.W_U": weights["lm_head.weight"].T,
    }
    for layer in range(count):
        old, new = f"model.layers.{layer + start}.", f"blocks.{layer}."
        state[new + "ln1.w"] = weights[old + "input_layernorm.weight"]
        state[new + "ln2.w"] = weights[old + "post_attention_layernorm.weight"]
        for theirs, ours, n in (("W_Q", "q", heads), ("_W_K", "k", groups), ("_W_V", "v", groups)):
            matrix = weights[f"{old}self_attn.{ours}_proj.weight"]
            state[f"{new}attn.{theirs}"] = matrix.unflatten(0, (n, head)).transpose(1, 2)
        output = weights[old + "self_attn.o_proj.weight"]
        state[new + "attn.W_O"] = output.T.unflatten(0, (heads, head))
        for theirs, ours in (("W_gate", "gate"), ("W_in", "up"), ("W_out", "down")):
            state[f"{new}mlp.{theirs}"] = weights[f"{old}mlp.{ours}_proj.weight"].T
    # What is not there: masks and tables of the rotation, and biases, which begin at 0.
    left = model.load_state_dict({k: v.contiguous() for k, v in state.items()}, strict=False)
    bare = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
    odd = [k for k in left.missing_keys if not k.endswith(bare) and not _is_bias(k)]
    assert not odd and not left.unexpected_keys, (odd, left.unexpected_keys)
    return model.eval()


def _is_bias(name: str) -> bool:
    return name.rsplit(".", 1)[-1].lstrip("_").startswith("b_")


class Reference:
    """The model, the texts and the metric of one job."""

    def __init__(self, folder: Path) -> None:
        """Read the job."""
        job = json.loads((folder / "job.json").read_text())
        torch.set_num_threads(job["threads"])
        self.folder = folder
        self.model = build(job["config"], job["start"], load_file(folder / "model.safetensors"))
        texts = [[" ".join(map(str, ids)) for ids in job[k]] for k in ("clean", "corrupt")]
        self.texts = texts[0], texts[1]
        self.read = {k: torch.tensor(v) for k, v in job["metric"].items()}

    def metric(self, logits: Tensor) -> Tensor:
        """Return m per text."""
        row, place = self.read["row"], self.read["place"]
        pair = logits[row, place, self.read["steered"]] - logits[row, place, self.read["base"]]
        return pair.new_zeros(len(logits)).index_add(0, row, pair)

    def attribute(
        self, graph: Any, method: str, total: bool, **options: Any
    ) -> tuple[float, float]:
        """Fill the graph's scores; wall and processor seconds."""
        from eap.attribute import attribute

        # It adds up what it is given and divides by the number of texts: a sum goes in.
        metric: Callable[..., Tensor] = lambda logits, *_: (  # noqa: E731
            self.metric(logits).sum() if total else self.metric(logits)
        )
        data = [(*self.texts, None)]
        wall, cpu = time.perf_counter(), time.process_time()
        attribute(self.model, graph, data, metric, method, quiet=True, **options)
        return time.perf_counter() - wall, time.process_time() - cpu

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order."""
        from eap.graph import Graph

        self.model.requires_grad_(not order.get("frozen", False))
        self.model.zero_grad()
        graph = Graph.from_model(self.model)
        if order["do"] == "describe":
            clean, corrupt = (self._logits(texts) for texts in self.texts)
            real = graph.real_edge_mask.float()
            tensors = {"clean": clean, "corrupt": corrupt, "edges": real}
            save_file(tensors, self.folder / "described.safetensors")
            sources = [name for name in graph.nodes if name != "logits"]
            return {"sources": sources, "targets": graph.get_dst_nodes(), **_versions()}
        if order["do"] == "exact":
            # In its own order: it prunes as it goes and does not restore what a last edge took along.
            wanted = set(order["edges"])
            graph.edges = {name: edge for name, edge in graph.edges.items() if name in wanted}
            self.attribute(graph, "exact", total=False)
            return {"scores": [float(graph.edges[name].score) for name in order["edges"]]}
        wall, cpu = self.attribute(graph, "EAP-IG-inputs", total=True, ig_steps=order["steps"])
        save_file({"scores": graph.scores}, self.folder / "scores.safetensors")
        return {"wall": wall, "cpu": cpu}

    @torch.no_grad()
    def _logits(self, texts: list[str]) -> Tensor:
        from eap.utils import tokenize_plus

        tokens, mask, _, _ = tokenize_plus(self.model, texts)
        return self.model(tokens, attention_mask=mask).contiguous()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformer-lens", "transformers", "numpy")
    return {"versions": ", ".join(f"{name} {version(name)}" for name in names)}


def main() -> None:
    """Serve one job until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout = sys.stderr  # libraries talk
    if not torch.cuda.is_available():
        on_processor()
    reference = Reference(Path(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(reference.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
