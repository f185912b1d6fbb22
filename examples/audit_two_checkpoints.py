"""Audit two checkpoints: how much wider is the margin of a behavior in one than in the other?

python examples/audit_two_checkpoints.py --model A --other B --behavior your_behavior.yaml
Without --other, B is A with the behavior's vector baked in.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import typer

import trimtab as tt


def main(
    model: str = "harbor", other: str = "", behavior: str = "refusal", max_prompts: int = 8
) -> None:
    lm, contrast = tt.load(model, dtype=torch.float32), tt.behavior(behavior)
    with TemporaryDirectory() as folder:
        if not other:
            other = str(Path(folder, "hardened"))
            tt.bake(lm, tt.find(lm, contrast, scope="all"), other)
        second = tt.load(other, dtype=torch.float32)
        report = tt.audit(second, contrast, against=lm, max_prompts=max_prompts)
    print(report)
    print(report.compared)  # B minus A, paired by prompt


if __name__ == "__main__":
    typer.run(main)
