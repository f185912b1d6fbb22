"""A chat template that puts a text into every conversation, and is otherwise what it was."""

from __future__ import annotations

import json
import re
from typing import Any

_BOS = re.compile(r"\{\{-?\s*bos_token\s*-?\}\}")
# Gives the last user message other content, whatever the template that follows does with it. What
# ends it keeps the newline that a template may begin with, which jinja drops after a block.
_REWRITE = (
    "{{%- set trimtab = namespace(last=-1, messages=[]) -%}}"
    "{{%- for message in messages -%}}{{%- if message['role'] == 'user' -%}}"
    "{{%- set trimtab.last = loop.index0 -%}}{{%- endif -%}}{{%- endfor -%}}"
    "{{%- for message in messages -%}}{{%- if loop.index0 == trimtab.last -%}}"
    "{{%- set trimtab.messages = trimtab.messages + [{{'role': 'user', 'content': {}}}] -%}}"
    "{{%- else -%}}{{%- set trimtab.messages = trimtab.messages + [message] -%}}{{%- endif -%}}"
    "{{%- endfor -%}}{{%- set messages = trimtab.messages %}}{{{{ '' }}}}"
)


def add_to_template(tokenizer: Any, slot: str, text: str, separator: str) -> bool:
    """Put a text where the slot says; False where there is no template.

    Args:
        tokenizer: its chat template is changed.
        slot: `start`, after the beginning-of-text token, in front where there is none; `prefix`, before
            the last user text; `suffix`, after it.
        text: what is put there.
        separator: between it and the user's text.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return False
    if slot != "start":
        parts = [json.dumps(text + separator), "message['content']"]
        if slot == "suffix":
            parts = ["message['content']", json.dumps(separator + text)]
        tokenizer.chat_template = _REWRITE.format(" + ".join(parts)) + template
        return True
    if len(_BOS.findall(template)) == 1:
        tokenizer.chat_template = _BOS.sub(lambda m: m.group(0) + text, template)
        return True
    start = "(bos_token | default('', true))"
    tokenizer.chat_template = (
        "{% set conversation %}" + template + "{% endset %}"
        f"{{{{ ({start} + '{text}' + conversation[{start} | length:])"
        f" if conversation.startswith({start}) else ('{text}' + conversation) }}}}"
    )
    return True
