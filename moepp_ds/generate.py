"""Continuing a text: `moepp generate`.

1. The prompt's tokens go through the model; the last position's logits say what may follow.
2. The next token is the most probable one, or drawn: softmax of logits / temperature, over the fewest tokens that
   hold a share top_p of the probability.
3. It is appended and all of it goes through the model again, until the end of the document or enough tokens.

The whole prefix is computed for every token. That is slow and leaves nothing to go wrong: no cache, and so the truth
that a cache is compared with. For serving, `moepp export` writes a model that `transformers` runs with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.document import DataError
from moepp_ds.controller import RoutingInputs
from moepp_ds.load import LoadedModel
from moepp_ds.model import MoEPlusPlusModel
from moepp_ds.products import linear


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the most probable, and neither top_p nor seed matter then."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise DataError(f"temperature {self.temperature:g} must be 0 (the most probable token) or a number above")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p {self.top_p:g} must lie above 0 and be at most 1 (every token)")
        if not 0 <= self.seed < 2**64:
            raise DataError(f"seed {self.seed} must be a whole number from 0 to {2**64 - 1}")


GREEDY = Sampling()


@dataclass(frozen=True)
class Completion:
    """prompt, new: token ids; the end of the document is the last of `new` where the model came to one.

    text: prompt and continuation, without the end.
    """

    prompt: list[int]
    new: list[int]
    text: str


@torch.no_grad()
def generate(
    model: MoEPlusPlusModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    vocab_size: int | None = None,
    routing: RoutingInputs | None = None,
) -> list[int]:
    """The ids that follow `prompt`: at most max_new_tokens, the last one eos_id if the document ended.

    vocab_size: ids that the tokenizer knows, where the model has more. routing: the controller's biases.
    Dropless, as all evaluation; where the recipe has attention stop at document ends, it does so here.
    """
    was_training, device = model.training, model.embedding.weight.device
    model.eval()
    ids, generator = list(prompt), torch.Generator().manual_seed(sampling.seed)
    for _ in range(max_new_tokens):
        h_BSD, _ = model.hidden(torch.tensor([ids], device=device), routing)
        logits_V = linear(h_BSD[0, -1], model.head.weight)[:vocab_size]
        ids.append(choose(logits_V, sampling, generator))
        if ids[-1] == model.eos_id:
            break
    model.train(was_training)
    return ids[len(prompt) :]


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token by its logits. Drawn on the CPU in float64, so that a seed gives one text on every device."""
    logits_V = logits_V.to("cpu", torch.float64)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    below_V = logits_V - logits_V.max()  # so that no temperature, however low, makes them infinite
    ranked_V, id_V = torch.softmax(below_V / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    before_V = ranked_V.cumsum(dim=-1) - ranked_V
    kept_V = ranked_V * (before_V < sampling.top_p)
    return int(id_V[torch.multinomial(kept_V, 1, generator=generator)])


def complete(loaded: LoadedModel, prompt: str, *, max_new_tokens: int, sampling: Sampling = GREEDY) -> Completion:
    """Continue a text; DataError where it and its continuation do not fit into a row of the recipe."""
    ids = loaded.encode(prompt)
    most = loaded.recipe.data.seq_len
    if len(ids) + max_new_tokens > most:
        left = most - len(ids)
        raise DataError(
            f"{len(ids):,} tokens of the prompt and {max_new_tokens:,} new ones are more than the {most:,} of a row "
            "that the model was trained on; "
            + (f"use --max-new-tokens {left} or fewer" if left else "shorten the prompt")
            + ", or allow more with --set data.seq_len=N"
        )
    vocab_size = loaded.tokenizer.vocab_size
    new = generate(
        loaded.model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        vocab_size=vocab_size,
        routing=loaded.routing,
    )
    ended = bool(new) and new[-1] == loaded.model.eos_id
    return Completion(ids, new, loaded.tokenizer.decode(ids + (new[:-1] if ended else new)))
