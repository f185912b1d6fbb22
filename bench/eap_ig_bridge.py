"""What `eap_ig.py` says to the reference's process, and what that says back, node for node."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.mechanism.circuits.graph import Graph, Node
from trimtab.mechanism.circuits.record import record
from trimtab.mechanism.circuits.teacher_forced import TokenRuns
from trimtab.models.model import LanguageModel

ROLES = {"q": "query", "k": "key", "v": "value"}


class Reference:
    """The other side, in its own process."""

    def __init__(self, checkout: Path, python: Path, folder: Path) -> None:
        """Start it on the job in the folder."""
        paths = [str(checkout / "src"), os.environ.get("PYTHONPATH", "")]
        self.folder = folder
        self.log = folder / "log"
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("eap_ig_reference.py")), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Give one order and wait for the answer."""
        pipes = self.process.stdin, self.process.stdout
        assert pipes[0] is not None and pipes[1] is not None  # opened above
        try:
            print(json.dumps({"do": do, **order}), file=pipes[0], flush=True)
            line = pipes[1].readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise TrimtabError(
                asked=f"EAP-IG to {do}",
                found=self.log.read_text()[-2000:],
                advice='give --python with torch, "transformer-lens>=2.15,<3" and safetensors',
            )
        return json.loads(line)

    def left(self, steps: int) -> Tensor:
        """Scores `[sources, targets]` by its own rule."""
        self.ask("attribute", steps=steps, frozen=True)
        return load_file(self.folder / "scores.safetensors")["scores"].double()


def hand_over(lm: LanguageModel, graph: Graph, runs: TokenRuns, folder: Path) -> tuple[Any, list]:
    """Write the job; return the batch and where its real tokens are."""
    ((batch, targets),) = runs.batches(lm)
    start = min(node.layer for node in graph.targets)
    recorded = record(lm, graph, runs.vector, batch, targets)
    real = [row.nonzero()[:, 0] for row in batch.attention_mask]
    corrupt = recorded.base.attention[start]
    sides = corrupt, corrupt + recorded.changes[0]
    rows = [side[i, kept] for side in sides for i, kept in enumerate(real)]
    table = torch.cat([*rows, torch.zeros(1, lm.d_model)])
    ends = torch.tensor([len(part) for part in rows]).cumsum(0).tolist()
    ids = [list(range(end - len(part), end)) for end, part in zip(ends, rows, strict=True)]
    row, column = (targets.steered != targets.base).nonzero().T
    # Both are padded, theirs on the right: places are counted from the first token.
    before = batch.attention_mask.shape[1] - batch.attention_mask.sum(1)
    place = batch.attention_mask.shape[1] - targets.keep + column - before[row]
    config = lm.model.config
    job = {
        "threads": torch.get_num_threads(),
        "start": start,
        "corrupt": ids[: len(real)],
        "clean": ids[len(real) :],
        "metric": {
            "row": row.tolist(),
            "place": place.tolist(),
            "steered": targets.steered[row, column].tolist(),
            "base": targets.base[row, column].tolist(),
        },
        "config": {
            "layers": lm.n_layers,
            "d_model": lm.d_model,
            "d_mlp": config.intermediate_size,
            "heads": config.num_attention_heads,
            "groups": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "context": config.max_position_embeddings,
            "vocabulary": config.vocab_size,
            "eps": config.rms_norm_eps,
            "rope_theta": config.rope_parameters["rope_theta"],
        },
    }
    (folder / "job.json").write_text(json.dumps(job))
    weights = {name: x.detach().contiguous() for name, x in lm.model.state_dict().items()}
    save_file({**weights, "rows": table}, folder / "model.safetensors")
    return batch, real


class Names:
    """Their nodes by ours."""

    def __init__(self, lm: LanguageModel, graph: Graph, said: dict[str, Any]) -> None:
        """Match all of them."""
        self.graph, self.said = graph, said
        self.start = min(node.layer for node in graph.targets)
        self.end = lm.n_layers
        self.group = lm.model.config.num_attention_heads // lm.model.config.num_key_value_heads
        self.columns = torch.tensor([graph.source_at[self._node(s)] for s in said["sources"]])
        self.rows = torch.tensor([graph.target_at[self._node(t)] for t in said["targets"]])

    def _node(self, name: str) -> Node:
        if name == "input":
            return self.graph.sources[0]
        if name == "logits":
            return Node("logits", self.end)
        if name.startswith("m"):
            return Node("mlp", self.start + int(name[1:]))
        found = re.fullmatch(r"a(\d+)\.h(\d+)(?:<([qkv])>)?", name)
        assert found is not None, name
        layer, head, role = self.start + int(found[1]), int(found[2]), found[3]
        if role is None:
            return Node("head", layer, head)
        return Node(ROLES[role], layer, head if role == "q" else head // self.group)

    def ours(self, theirs: Tensor) -> Tensor:
        """Bring `[sources, targets]` to our `[targets, sources]`, sums over shared keys and values."""
        result = torch.zeros(self.graph.edges.shape, dtype=torch.float64)
        places = self.rows[None, :].expand_as(theirs), self.columns[:, None].expand_as(theirs)
        return result.index_put_(places, theirs.double(), accumulate=True)

    def alone(self, edges: list[int]) -> tuple[list[int], list[str]]:
        """Of our flat edges those that are one edge there, and its name."""
        sources = {int(c): name for c, name in zip(self.columns, self.said["sources"], strict=True)}
        targets = {int(r): name for r, name in zip(self.rows, self.said["targets"], strict=True)}
        kept = [
            edge
            for edge in edges
            if self.graph.targets[edge // len(sources)].kind not in ("key", "value")
        ]
        names = [f"{sources[e % len(sources)]}->{targets[e // len(sources)]}" for e in kept]
        return kept, names
