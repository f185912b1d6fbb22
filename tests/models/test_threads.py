"""One model in many threads and tasks: each gets the answers it would get alone."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

import trimtab as tt
from tiny import language_model
from trimtab.errors import TrimtabError
from trimtab.models.attention import NAME, attending
from trimtab.models.model import LanguageModel
from trimtab.steering.prompt import PromptSteering

ANSWERS = 200
PROMPTS = ["How do I borrow the rowboat?", "Where is the ferry?", "Tell me about cats.", "Hello"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return language_model("llama")


def levers(lm: LanguageModel) -> list[Callable[[], AbstractContextManager[None]]]:
    """Two levers of a kind each, and none."""
    torch.manual_seed(1)
    c = torch.randn(lm.d_model)

    def vector(alpha: float, scope: str) -> Callable[[], AbstractContextManager[None]]:
        made = tt.VectorSteering.from_directions(lm, {1: c, 2: c}, alpha=alpha, scope=scope)
        return lambda: made.on(lm)

    soft = PromptSteering("", slot="prefix", vectors=torch.randn(3, lm.d_model))
    other = PromptSteering("", slot="prefix", vectors=torch.randn(2, lm.d_model))
    return [
        nullcontext,
        vector(2.0, "all"),
        vector(-3.0, "generated"),
        lambda: tt.prompt("Talk only about cats.").on(lm),
        lambda: soft.on(lm),
        lambda: other.on(lm),
        vector(4.0, "last"),
        lambda: tt.prompt("Be brief.", slot="suffix").on(lm),
    ]


def answer(lm: LanguageModel, number: int) -> str:
    """One short answer; every third one is sampled."""
    temperature = 0.0 if number % 3 else 1.0
    prompt = PROMPTS[number % len(PROMPTS)]
    return lm.generate(prompt, max_new_tokens=4, temperature=temperature, seed=number)


def alone(lm: LanguageModel, enter: Callable[[], AbstractContextManager[None]]) -> list[str]:
    found = []
    for number in range(12):
        with enter():
            found.append(answer(lm, number))
    return [found[number % 12] for number in range(ANSWERS)]


def untouched(lm: LanguageModel) -> tuple[object, ...]:
    modules = [m for m in lm.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    replaced = [m for m in lm.model.modules() if "forward" in m.__dict__]
    kept = lm.active_batch, lm.system, lm.inserts, lm.soft_count
    return lm.model.generation_config.to_dict(), kept, len(modules), len(replaced)


def test_eight_threads_with_mixed_steerings(lm: LanguageModel) -> None:
    ways = levers(lm)
    expected = [alone(lm, enter) for enter in ways]
    assert len({tuple(each) for each in expected}) == len(ways)  # every lever shows
    before, state = untouched(lm), torch.random.get_rng_state()
    start = threading.Barrier(len(ways))

    def work(enter: Callable[[], AbstractContextManager[None]]) -> list[str]:
        found = []
        start.wait()
        for number in range(ANSWERS):
            with enter():
                found.append(answer(lm, number % 12))
        return found

    with ThreadPoolExecutor(len(ways)) as pool:
        assert list(pool.map(work, ways)) == expected
    assert untouched(lm) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_eight_threads_that_stay_inside_their_blocks(lm: LanguageModel) -> None:
    ways = levers(lm)
    expected = [alone(lm, enter)[:24] for enter in ways]

    def work(enter: Callable[[], AbstractContextManager[None]]) -> list[str]:
        with enter():
            return [answer(lm, number % 12) for number in range(24)]

    with ThreadPoolExecutor(len(ways)) as pool:
        assert list(pool.map(work, ways)) == expected


def test_ten_tasks_that_await_inside_their_blocks(lm: LanguageModel) -> None:
    ways = [*levers(lm), nullcontext, levers(lm)[1]]
    expected = [alone(lm, enter)[:20] for enter in ways]
    before = untouched(lm)

    async def work(enter: Callable[[], AbstractContextManager[None]]) -> list[str]:
        found = []
        with enter():
            for number in range(20):
                await asyncio.sleep(0)
                found.append(answer(lm, number % 12))
        return found

    async def main() -> list[list[str]]:
        return list(await asyncio.gather(*map(work, ways)))

    assert asyncio.run(main()) == expected
    assert sum(map(len, expected)) == ANSWERS and untouched(lm) == before


def test_threads_that_inherit_one_block_do_not_mix_their_calls(lm: LanguageModel) -> None:
    enter = levers(lm)[2]  # scope generated: needs each call's own prompt length
    expected = alone(lm, enter)[:40]

    async def main() -> list[str]:
        with enter():
            calls = [asyncio.to_thread(answer, lm, number % 12) for number in range(40)]
            return list(await asyncio.gather(*calls))

    assert asyncio.run(main()) == expected


def test_tasks_that_inherit_one_block_may_step_by_themselves(lm: LanguageModel) -> None:
    """Without a batch, what a call goes on from is the task's own last call."""
    enter = levers(lm)[2]

    async def steps(prompt: str) -> list[int]:
        ids, cache = torch.tensor([lm.encode(prompt).ids]), None
        found = []
        for _ in range(4):
            with torch.no_grad():
                out = lm.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            found.append(int(ids))
            await asyncio.sleep(0)
        return found

    async def main(together: bool) -> list[list[int]]:
        with enter():
            if together:
                return list(await asyncio.gather(*map(steps, PROMPTS)))
            return [await steps(prompt) for prompt in PROMPTS]

    assert asyncio.run(main(True)) == asyncio.run(main(False))


def test_blocks_may_be_left_in_another_order(lm: LanguageModel) -> None:
    first, second = tt.prompt("Talk only about cats.").on(lm), tt.prompt("Be brief.").on(lm)
    first.__enter__()
    second.__enter__()
    assert lm.system == "Be brief."
    first.__exit__(None, None, None)
    assert lm.system == "Be brief."
    second.__exit__(None, None, None)
    assert lm.system is None
    ways = levers(lm)
    soft, other = ways[4](), ways[5]()
    before = untouched(lm)
    soft.__enter__()
    other.__enter__()
    soft.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert untouched(lm) == before


def test_a_thread_started_inside_is_told_that_it_is_not_steered(lm: LanguageModel) -> None:
    plain, enter = answer(lm, 1), levers(lm)[1]
    found: list[str] = []

    def work() -> None:
        found.append(answer(lm, 1))

    with enter():
        steered = answer(lm, 1)
        with pytest.warns(RuntimeWarning, match="is not steered by it"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(work,))
            thread.start()
            thread.join()
    assert found == [plain, steered] and plain != steered


def test_a_block_that_goes_on_in_another_context_says_so(lm: LanguageModel) -> None:
    def stream():
        with levers(lm)[1]():
            yield answer(lm, 1)
            yield answer(lm, 1)

    plain, generator = answer(lm, 1), stream()
    first = contextvars.copy_context().run(next, generator)
    assert contextvars.copy_context().run(next, generator) == plain != first
    with pytest.raises(TrimtabError, match="entered in one thread or task and left in another"):
        contextvars.copy_context().run(next, generator)
    assert answer(lm, 1) == plain


def test_a_block_run_again_by_autograd_elsewhere_is_refused(lm: LanguageModel) -> None:
    """On an accelerator, checkpointed blocks run again in threads of autograd."""
    lm = language_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers give it another name
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    lm.model.train()
    inside = tt.VectorSteering.from_directions(lm, {1: torch.ones(lm.d_model)}, site="attn_out")
    failed: list[BaseException] = []

    def backward(loss: torch.Tensor) -> None:
        try:
            loss.backward()
        except TrimtabError as error:
            failed.append(error)

    with inside.on(lm):
        ids = torch.tensor([lm.encode("Hello").ids])
        lm.model(
            input_ids=ids, use_cache=False
        ).logits.sum().backward()  # in the block's own thread
        loss = lm.model(input_ids=ids, use_cache=False).logits.sum()
        thread = threading.Thread(target=backward, args=(loss,))
        thread.start()
        thread.join()
    assert "gradient checkpointing" in str(failed[0])


def test_what_looks_into_attention_changes_no_other_thread(lm: LanguageModel) -> None:
    """The configuration names another attention function, with another mask, to one thread alone."""
    expected = [answer(lm, number) for number in range(12)]
    config, done, seen = lm.model.config, threading.Event(), []
    kind = type(config)

    def look() -> None:
        while not done.is_set():
            with attending(lm, lambda call: seen.append(call.layer)):
                assert config._attn_implementation == NAME
                lm.next_logits("Hello")

    thread = threading.Thread(target=look)
    thread.start()
    found = [answer(lm, number % 12) for number in range(60)]
    done.set()
    thread.join()
    assert found == expected * 5 and seen
    assert type(config) is kind and config._attn_implementation != NAME
