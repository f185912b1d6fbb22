"""Find a circuit: which edges, heads and MLPs carry a vector, and what each finding means for you.

python examples/find_a_circuit.py --model YOUR_MODEL --behavior your_behavior.yaml --layer 12
"""

import torch
import typer

import trimtab as tt


def main(
    model: str = "harbor",
    behavior: str = "refusal",
    layer: int = 5,
    strength: float = 7.5,
    max_prompts: int = 2,
    max_new_tokens: int = 20,
) -> None:
    lm = tt.load(model, dtype=torch.float32)  # the small effects of edges need full precision
    contrast = tt.behavior(behavior)
    vector = tt.find(lm, contrast, layers=[layer], scope="all").at(strength)
    why = tt.explain(lm, contrast, vector, max_prompts=max_prompts, max_new_tokens=max_new_tokens)
    print(why)  # the findings; why.tables() has every figure, with nulls and intervals
    print(why.circuit)


if __name__ == "__main__":
    typer.run(main)
