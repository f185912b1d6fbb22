"""The setting in which the laws of steering strength are theorems, and those theorems checked.

An unconstrained features model has logits W h_c with a free vector h_c per context. Concepts
partition the vocabulary, each context belongs to one, and p(z|c) = a_z if z shares the context's
concept, else b_z, 1 > a_z > b_z > 0. The steering vector is the mean of h over positive contexts
(of the target concept) minus the mean over negative ones (of others). With M(z), the mean log p(z)
over positive contexts minus the mean over negative ones, p_alpha(z|c) ~ p(z|c) exp(alpha M(z)).

Source: Taimeskhanov, Vaiter and Garreau, "Towards Understanding Steering Strength", arXiv
2602.02712, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.theory.tilt import Tilt

VALID = 1e-12  # how far from 1 the probabilities of a context may sum

EXAMPLE = {
    "harbor": ("pier", "tide", "anchor", "gull", "ferry", "rope"),
    "weather": ("rain", "wind", "cloud", "frost", "storm", "haze"),
    "kitchen": ("bread", "salt", "kettle", "spoon", "onion", "stove"),
    "music": ("drum", "chord", "fiddle", "waltz", "choir", "reed"),
}


@dataclass(frozen=True, eq=False)
class FeaturesModel:
    """A trained unconstrained features model and the contexts that its steering vector comes from.

    Attributes:
        concepts: the tokens of each concept; together, in this order, they are the vocabulary.
        contexts: the concept of every context.
        likely: a, the probability of each token in contexts of its concept, [vocab].
        unlikely: b, the same in all other contexts, [vocab].
        positive: indices of contexts of one concept, the target.
        negative: indices of contexts of other concepts.
        unembedding: W, [vocab, d].
        features: h, [contexts, d]; W h_c = log p(.|c) up to a constant that differs by context.
        weights: pi, how often each context occurs, [contexts].

    Raises:
        TrimtabError: when the tables are no such model; it says where they fail.
    """

    concepts: Mapping[str, Sequence[str]]
    contexts: tuple[str, ...]
    likely: Tensor
    unlikely: Tensor
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    unembedding: Tensor
    features: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        """Check the assumptions that the theorems rest on."""
        if len(set(self.tokens)) != len(self.tokens):
            raise _refusal("two concepts that share a token", "concepts must be disjoint")
        if unknown := sorted(set(self.contexts) - set(self.concepts)):
            raise _refusal(
                f"contexts of {', '.join(unknown)}", "every context belongs to one of the concepts"
            )
        a, b = self.likely, self.unlikely
        if not a.shape == b.shape == (len(self.tokens),) or not bool(
            ((1 > a) & (a > b) & (b > 0)).all()
        ):
            raise _refusal(
                "probabilities a and b without 1 > a > b > 0 for every token",
                "give one a and one b per token; `balanced` makes them",
            )
        off = float((self.probabilities.sum(-1) - 1).abs().max())
        if off > VALID:
            raise _refusal(
                f"a context whose probabilities sum to 1 with an error of {off:.1e}",
                "sum of a in a concept plus sum of b outside must be 1 for each; `balanced` does it",
            )
        sides = [{self.contexts[j] for j in side} for side in (self.positive, self.negative)]
        if len(sides[0]) != 1 or not sides[1] or sides[0] & sides[1]:
            raise _refusal(
                f"positive contexts of {sorted(sides[0])}, negative ones of {sorted(sides[1])}",
                "take positive contexts from one concept and negative ones from others",
            )

    @classmethod
    def build(
        cls,
        concepts: Mapping[str, Sequence[str]],
        contexts: Sequence[str],
        likely: Tensor,
        unlikely: Tensor,
        positive: Sequence[int],
        negative: Sequence[int],
        *,
        weights: Tensor | None = None,
        seed: int = 0,
    ) -> FeaturesModel:
        """Realize probabilities by a random W [vocab, vocab] and the h_c that reproduce them.

        Args:
            concepts: see the class, as are the next five.
            contexts: the concept of every context.
            likely: a.
            unlikely: b.
            positive: contexts with the target.
            negative: contexts without it.
            weights: pi, any positive numbers; equal when not given.
            seed: of W and of the constants that logits may differ by.
        """
        generator = torch.Generator().manual_seed(seed)
        vocab, n = likely.shape[0], len(contexts)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        # Orthogonal, so that features carry the logits without loss of digits.
        unembedding = torch.linalg.qr(draw(vocab, vocab)).Q
        pi = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
        model = cls(
            concepts,
            tuple(contexts),
            likely.double(),
            unlikely.double(),
            tuple(positive),
            tuple(negative),
            unembedding,
            torch.zeros(n, vocab, dtype=torch.float64),
            pi / pi.sum(),
        )
        logits = model.probabilities.log() + draw(n, 1)
        object.__setattr__(model, "features", logits @ unembedding)
        return model

    @classmethod
    def example(cls, seed: int = 1) -> FeaturesModel:
        """Make a small readable instance: 4 concepts of 6 tokens, 3 contexts each, target harbor.

        Of the three negative contexts two are about weather and one about the kitchen; music
        appears on neither side, so its tokens have M = 0.
        """
        generator = torch.Generator().manual_seed(seed)
        contexts = [name for name in EXAMPLE for _ in range(3)]
        sizes = [len(tokens) for tokens in EXAMPLE.values()]
        ratios = 2 + 8 * torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
        base = 0.3 + torch.rand(sum(sizes), generator=generator, dtype=torch.float64)
        likely, unlikely = balanced(sizes, ratios, base)
        return cls.build(EXAMPLE, contexts, likely, unlikely, (0, 1, 2), (3, 4, 6), seed=seed)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The vocabulary, concept after concept."""
        return tuple(token for tokens in self.concepts.values() for token in tokens)

    @cached_property
    def concept_of(self) -> tuple[str, ...]:
        """The concept of every token."""
        return tuple(name for name, tokens in self.concepts.items() for _ in tokens)

    @property
    def target(self) -> str:
        """The concept that is steered toward."""
        return self.contexts[self.positive[0]]

    @cached_property
    def probabilities(self) -> Tensor:
        """p(z|c), [contexts, vocab]."""
        shared = torch.tensor([[c == k for k in self.concept_of] for c in self.contexts])
        return torch.where(shared, self.likely, self.unlikely)

    @cached_property
    def steering_vector(self) -> Tensor:
        """v, the difference of mean features, [d]."""
        positive, negative = list(self.positive), list(self.negative)
        return self.features[positive].mean(0) - self.features[negative].mean(0)

    @cached_property
    def log_odds(self) -> Tensor:
        """M(z), mean log p over positive contexts minus the mean over negative ones, [vocab]."""
        log_p = self.probabilities.log()
        return log_p[list(self.positive)].mean(0) - log_p[list(self.negative)].mean(0)

    @cached_property
    def tilt(self) -> Tilt:
        """What theory says: every context's p(.|c) tilted by M."""
        log_p = self.probabilities.log()
        return Tilt(log_p, self.log_odds.expand_as(log_p))

    def members(self, concept: str) -> list[int]:
        """Return the token ids of a concept."""
        return [z for z, name in enumerate(self.concept_of) if name == concept]

    def steered(self, alpha: float | Tensor) -> Tensor:
        """Return log softmax(W (h_c + alpha v)), by brute force.

        Args:
            alpha: a number, or strengths [k].

        Returns:
            [contexts, vocab] or [k, contexts, vocab].
        """
        push = torch.as_tensor(alpha, dtype=torch.float64)[..., None, None] * self.steering_vector
        return torch.log_softmax((self.features + push) @ self.unembedding.T, dim=-1)

    def cross_entropy(self, alpha: float | Tensor) -> Tensor:
        """Return the steered model's cross-entropy on its data by brute force, nats, [] or [k]."""
        each = -(self.probabilities * self.steered(alpha)).sum(-1)
        return each @ self.weights


def balanced(sizes: Sequence[int], ratios: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a, b) with a_z / b_z as given and every context's probabilities summing to 1.

    b is proportional to `base` within each concept. With g_k the mean of ratio - 1 over concept k
    under it, b has mass delta / g_k there and delta = 1 / (1 + sum_k 1 / g_k).

    Args:
        sizes: tokens per concept.
        ratios: a / b, above 1, [vocab].
        base: relative frequencies within each concept, positive, [vocab].
    """
    shares = torch.cat([part / part.sum() for part in base.double().split(list(sizes))])
    gains = ((ratios.double() - 1) * shares).split(list(sizes))
    gain = torch.stack([part.sum() for part in gains])
    delta = 1 / (1 + (1 / gain).sum())
    unlikely = shares * (delta / gain).repeat_interleave(torch.tensor(list(sizes)))
    return ratios.double() * unlikely, unlikely


def _refusal(found: str, advice: str) -> TrimtabError:
    return TrimtabError(asked="an unconstrained features model", found=found, advice=advice)
