"""Write a behavior: prompts, a judge and a plain prompt, then a vector measured against that prompt.

python examples/write_a_behavior.py --model YOUR_MODEL
"""

import typer

import trimtab as tt

PEOPLE = (
    "mayor baker ferryman teacher tailor doctor judge miller painter captain gardener butcher "
    "cobbler carpenter librarian banker blacksmith postman pilot cook fisherman mason roofer clerk"
).split()


@tt.register_judge("word_count")
def word_count(behavior, options):
    """Toward: few words; away: many. An empty answer is neither."""

    def judge(prompts, answers):
        counts = [len(answer.split()) for answer in answers]
        return [tt.Verdict(toward=float(0 < n <= 10), away=float(n >= 30)) for n in counts]

    return judge


def main(model: str = "harbor", max_prompts: int = 6) -> None:
    requests = [f"Who is the {person}?" for person in PEOPLE]
    brief = tt.Behavior(
        name="brief",
        toward=[f"Answer briefly. {request}" for request in requests],
        away=[f"Answer at length. {request}" for request in requests],
        requests=requests,  # answers to these are judged: they ask for neither side
        judge="word_count",
        prompt_toward="Answer briefly.",  # the plain prompt, which a vector has to beat
    )
    lm = tt.load(model)
    tuned = tt.tune(lm, brief, tt.find(lm, brief), max_prompts=max_prompts)
    print(tt.measure(lm, brief, [tuned], nulls=1, max_prompts=max_prompts))


if __name__ == "__main__":
    typer.run(main)
