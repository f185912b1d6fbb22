"""Training rows: conversations tokenized, packed, and masked so that the request is summarized before it is answered.

In most training documents an answer may attend only to itself and to the tokens between the last user text and the
answer (`<end>`, `<assistant>`, newline), never to the request itself. What the answer needs must therefore be written
into the state of those tokens, as large models do by themselves. The released model uses plain causal attention.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from tools.harbor.world import Conversation, conversations

HIDDEN_SHARE = 0.9  # of the documents hide the request from the answer's attention
PROMPT_WEIGHT = 0.15  # loss weight of tokens that are not part of an answer


@dataclass(frozen=True)
class Rows:
    """A batch of packed rows; every tensor is [rows, length].

    `document` numbers the documents of a row from 1 (0 is padding), `turn` the answers of a document from 1 (0 outside
    of answers and their headers), `hidden` marks answer tokens that may not see the request.
    """

    ids: torch.Tensor
    position: torch.Tensor
    document: torch.Tensor
    turn: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor

    def attention(self) -> torch.Tensor:
        """Return the boolean attention mask, [rows, 1, length, length]."""
        n = self.ids.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        same = self.document[:, :, None] == self.document[:, None, :]
        first = (self.position == 0)[:, None, :]
        own = self.turn[:, :, None] == self.turn[:, None, :]
        return (causal & same & (~self.hidden[:, :, None] | own | first))[:, None]


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """Return a conversation as the text that the chat template makes of it."""
    text = tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    assert isinstance(text, str)  # what tokenize=False promises
    return text


def annotate(ids: list[int], end: int, assistant: int) -> tuple[list[int], list[bool]]:
    """Number the answers of one document (headers included) and mark the tokens of the answers themselves.

    Args:
        ids: token ids of one rendered conversation.
        end: id of `<end>`.
        assistant: id of `<assistant>`.
    """
    turn, answer = [0] * len(ids), [False] * len(ids)
    number = 0
    for i, token in enumerate(ids):
        if token != assistant:
            continue
        number += 1
        turn[i - 1] = turn[i] = turn[i + 1] = number
        j = i + 2
        while j < len(ids):
            turn[j], answer[j] = number, True
            if ids[j] == end:
                break
            j += 1
    return turn, answer


def packed_rows(
    tokenizer: PreTrainedTokenizerBase, seed: int, rows: int, length: int
) -> Iterator[Rows]:
    """Yield endless training batches of `rows` x `length` tokens; the same seed gives the same stream."""
    rng = random.Random(seed + 1)
    stream = conversations(seed)
    end, assistant = (tokenizer.get_vocab()[token] for token in ("<end>", "<assistant>"))
    waiting: list[list[int]] = []
    while True:
        out = {
            k: torch.zeros(rows, length, dtype=torch.long)
            for k in ("ids", "position", "document", "turn")
        }
        hidden = torch.zeros(rows, length, dtype=torch.bool)
        weight = torch.zeros(rows, length)
        for r in range(rows):
            used, number = 0, 0
            while True:
                if not waiting:
                    texts = [render(tokenizer, next(stream)) for _ in range(512)]
                    waiting = [
                        ids
                        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
                        if len(ids) <= length
                    ]
                fits = (
                    k
                    for k in range(len(waiting) - 1, max(-1, len(waiting) - 40), -1)
                    if used + len(waiting[k]) <= length
                )
                choice = next(fits, None)
                if choice is None:
                    break
                ids = waiting.pop(choice)
                number += 1
                span = slice(used, used + len(ids))
                turn, answer = annotate(ids, end, assistant)
                out["ids"][r, span] = torch.tensor(ids)
                out["position"][r, span] = torch.arange(len(ids))
                out["document"][r, span] = number
                out["turn"][r, span] = torch.tensor(turn)
                answered = torch.tensor(answer)
                weight[r, span] = torch.where(answered, 1.0, PROMPT_WEIGHT)
                weight[r, used] = 0.0  # nothing predicts the first token of a document
                if rng.random() < HIDDEN_SHARE:
                    hidden[r, span] = answered
                used += len(ids)
        yield Rows(out["ids"], out["position"], out["document"], out["turn"], hidden, weight)
