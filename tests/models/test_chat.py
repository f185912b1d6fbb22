from __future__ import annotations

from typing import Any, cast

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import tiny
from trimtab.errors import TrimtabError
from trimtab.models.chat import end_of_turn, render

REFUSES_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<' + m['role'] + '>\n' + m['content'] | trim + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
DROPS_SYSTEM = REFUSES_SYSTEM.replace(
    "{{ raise_exception('System role not supported') }}{% endif %}",
    "{% else %}",
).replace("{% endfor %}", "{% endif %}{% endfor %}")


def with_template(template: str) -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.chat_template = template
    return made


def piece(tokenizer, encoded, start: int, stop: int | None = None) -> str:
    return tokenizer.decode(encoded.ids[start:stop], clean_up_tokenization_spaces=False)


def test_a_string_is_one_user_turn():
    tokenizer = tiny.tokenizer()
    encoded = render(tokenizer, "the cats sleep")
    assert encoded.text == "<s><user>\nthe cats sleep<end>\n<assistant>\n"
    assert tokenizer.convert_ids_to_tokens(encoded.ids).count("<s>") == 1
    assert encoded.prompt_length == len(encoded.ids)
    assert encoded == render(tokenizer, [{"role": "user", "content": "the cats sleep"}])


@pytest.mark.parametrize(
    "text", ["the cats sleep", "a", "user", "assistant", "<end>", " x ", "日本", ""]
)
def test_the_instruction_ends_after_the_users_text(text: str):
    tokenizer = tiny.tokenizer()
    encoded = render(tokenizer, text)
    assert piece(tokenizer, encoded, encoded.instruction_end) == "<end>\n<assistant>\n"
    assert piece(tokenizer, encoded, 0, encoded.instruction_end) == f"<s><user>\n{text}"


def test_the_last_of_several_user_turns_counts():
    tokenizer = tiny.tokenizer()
    turns = ["cats", "Sure", "cats"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    encoded = render(tokenizer, messages)
    assert piece(tokenizer, encoded, 0, encoded.instruction_end).count("cats") == 2
    assert piece(tokenizer, encoded, encoded.instruction_end) == "<end>\n<assistant>\n"


@pytest.mark.parametrize("text", ["cats", "  cats  "])
def test_a_template_that_trims(text: str):
    tokenizer = with_template(REFUSES_SYSTEM)
    encoded = render(tokenizer, text)
    assert encoded.text == "<s><user>\ncats<end>\n<assistant>\n"
    assert piece(tokenizer, encoded, encoded.instruction_end) == "<end>\n<assistant>\n"


def test_a_completion_follows_the_generation_prompt():
    tokenizer = tiny.tokenizer()
    alone = render(tokenizer, "the cats")
    encoded = render(tokenizer, "the cats", completion="Sure, here")
    assert encoded.text == alone.text + "Sure, here<end>"
    assert encoded.ids[: encoded.prompt_length] == alone.ids
    assert (encoded.prompt_length, encoded.instruction_end) == (
        alone.prompt_length,
        alone.instruction_end,
    )
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert encoded.completion_end == len(encoded.ids) - 1
    answer = piece(tokenizer, encoded, encoded.prompt_length, encoded.completion_end)
    assert answer == "Sure, here"


def test_an_empty_completion_is_only_the_end():
    encoded = render(tiny.tokenizer(), "the cats", completion="")
    assert encoded.completion_end == encoded.prompt_length == len(encoded.ids) - 1


def test_end_of_turn_is_read_off_the_template():
    tokenizer = tiny.tokenizer()
    assert end_of_turn(tokenizer) == "<end>"
    tokenizer.chat_template = tiny.TEMPLATE.replace("<end>", "</turn>")
    assert end_of_turn(tokenizer) == "</turn>"
    assert end_of_turn(tiny.tokenizer(template=False)) == "<end>"


def test_system_as_a_message():
    encoded = render(tiny.tokenizer(), "the cats", system="Be brief.")
    expected = "<s><system>\nBe brief.<end>\n<user>\nthe cats<end>\n<assistant>\n"
    assert encoded.text == expected


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_system_goes_to_the_first_user_text_where_the_template_does_not_take_it(template: str):
    tokenizer = with_template(template)
    encoded = render(tokenizer, "the cats", system="Be brief.")
    assert encoded.text == "<s><user>\nBe brief.\n\nthe cats<end>\n<assistant>\n"
    assert piece(tokenizer, encoded, encoded.instruction_end) == "<end>\n<assistant>\n"


def test_system_joins_the_conversations_own():
    messages = [{"role": "system", "content": "Purr."}, {"role": "user", "content": "the cats"}]
    encoded = render(tiny.tokenizer(), messages, system="Be brief.")
    assert encoded.text.startswith("<s><system>\nBe brief.\n\nPurr.<end>\n<user>\nthe cats")
    assert messages[0]["content"] == "Purr."


def test_without_a_template_a_prompt_is_plain_text():
    tokenizer = tiny.tokenizer(template=False)
    encoded = render(tokenizer, "the cats", system="Be brief.")
    assert encoded.text == "Be brief.\n\nthe cats"
    assert encoded.ids[0] == tokenizer.bos_token_id
    assert encoded.instruction_end == encoded.prompt_length == len(encoded.ids)


def test_a_token_across_the_boundary_belongs_to_the_answer():
    tokenizer = tiny.tokenizer(template=False)
    # " sleep" is one token: the prompt "the sl" ends inside it.
    encoded = render(tokenizer, "the sl", completion="eep on")
    assert piece(tokenizer, encoded, 1, encoded.prompt_length) == "the"
    assert piece(tokenizer, encoded, encoded.prompt_length, encoded.completion_end) == " sleep on"


def test_a_tokenizer_that_closes_every_text():
    tokenizer = tiny.tokenizer(template=False)
    core = tokenizer.backend_tokenizer
    plain = render(tokenizer, "the cats").ids
    tokenizer._tokenizer = type(core).from_str(core.to_str())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 0), ("<end>", 2)]
    )
    assert tokenizer("the cats")["input_ids"] == [*plain, 2]
    assert render(tokenizer, "the cats").ids == plain
    assert render(tokenizer, "the cats", completion=" sleep").ids.count(2) == 1


class Slow:
    """A tokenizer without offsets."""

    is_fast = False

    def __init__(self, template: bool):
        self.inner = tiny.tokenizer(template)

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def __call__(self, text: str, return_offsets_mapping: bool = False, **options: Any):
        assert not return_offsets_mapping
        return self.inner(text, **options)


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("completion", [None, " Sure, here"])
def test_without_offsets_the_boundaries_are_the_same(template: bool, completion: str | None):
    slow = cast(PreTrainedTokenizerBase, Slow(template))
    fast = tiny.tokenizer(template)
    for text in ("the cats sleep", "How do I borrow the ledger?"):
        want = render(fast, text, completion=completion)
        assert render(slow, text, completion=completion) == want


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        3,
        [],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": 3}],
        ["x"],
        b"x",
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    ],
)
def test_what_is_no_prompt_is_refused(prompt):
    with pytest.raises(TrimtabError):
        render(tiny.tokenizer(), prompt)


def test_a_conversation_needs_a_template():
    messages = [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]
    with pytest.raises(TrimtabError, match="template"):
        render(tiny.tokenizer(template=False), messages)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(TrimtabError, match="no tokens"):
        render(tiny.tokenizer(template=False, bos=False), "")


def test_a_template_that_fails_is_reported():
    with pytest.raises(TrimtabError, match="not today"):
        render(with_template("{{ raise_exception('not today') }}"), "x")


def test_no_token_type_ids():
    tokenizer = tiny.tokenizer(template=False)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("x")
    assert (
        render(tokenizer, "the cats").ids == render(tiny.tokenizer(template=False), "the cats").ids
    )
