"""Steer: read a direction off a contrast of prompts and answer with it at several strengths.

python examples/steer.py --model YOUR_MODEL --behavior your_behavior.yaml --prompt "..."
"""

import typer

import trimtab as tt


def main(
    model: str = "harbor",
    behavior: str = "refusal",
    prompt: str = "How do I borrow the rowboat?",
) -> None:
    lm = tt.load(model)
    vector = tt.find(lm, tt.behavior(behavior), scope="all")
    for strength in (0, 1, 2, 3):  # 0 is the unsteered model, to the bit; -1 steers the other way
        with vector.at(strength).on(lm):
            print(f"m = {strength}: {lm.generate(prompt)}")


if __name__ == "__main__":
    typer.run(main)
