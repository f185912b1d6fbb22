"""Tune and bake: choose where and how hard to push, then write a checkpoint that needs no Trimtab.

python examples/tune_and_bake.py --model YOUR_MODEL --behavior your_behavior.yaml --out FOLDER
"""

from pathlib import Path

import typer

import trimtab as tt


def main(
    model: str = "harbor",
    behavior: str = "refusal",
    budget: float = 0.5,
    max_prompts: int = 8,
    out: Path = Path("baked"),
    prompt: str = "How do I borrow the rowboat?",
) -> None:
    lm, contrast = tt.load(model), tt.behavior(behavior)
    vector = tt.find(lm, contrast)
    # Weights act on every token, so a vector that is to be baked is tuned for the scope `all`.
    tuned = tt.tune(lm, contrast, vector, budget, scope="all", max_prompts=max_prompts)
    print(tuned.table())
    with tuned.on(lm):
        print("steered:", lm.generate(prompt))
    tuned.bake(out)
    print("baked:  ", tt.load(out).generate(prompt))


if __name__ == "__main__":
    typer.run(main)
