"""An Inspect task: does the answer name what the town's question asks for?"""

from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


@task
def harbor_facts(questions: str = "harbor_facts.jsonl") -> Task:
    """Answer in the model's own words; `-T questions=FILE` reads the questions elsewhere."""
    return Task(
        dataset=json_dataset(questions, FieldSpec(input="question", target="value")),
        solver=generate(),
        scorer=includes(),
        config=GenerateConfig(temperature=0, max_tokens=40),
    )
