"""Upcycling: published checkpoints become the start of a run (as in BAM, arXiv 2408.08274, for dense ones).

A published MoE gains zero-computation experts and keeps all that it has: experts, router rows, shared experts,
attention, embeddings, head. Dense checkpoints become FFN experts: copied, copied with noise, or split into fine-grained
ones; what they share is averaged or taken from the first.

1. `source`  config.json becomes the recipe's model section; what this model cannot do is refused by name
2. `fit`     the recipe's own `model` keys are laid over it; sizes that contradict the weights are refused
3. `layout`  every tensor of every folder is checked by name, shape and dtype before anything is written
4. `parts`   which part of which dense FFN is which expert
5. `fresh`   what no checkpoint has, chosen so that the model begins close to what the checkpoint computes
6. `pieces`  all of it, tensor by tensor
7. `program` puts them together, into a run folder that `--resume auto` continues at update 0

Without zero-computation experts the upcycled model computes what the original does, for a MoE, for copies with
renormalized weights, and for a dense FFN split into parts that are all taken (router.threshold 1).

The shards must be made with the checkpoint's own tokenizer; ids of another one mean nothing to its embedding.
"""

from __future__ import annotations

from moepp_ds.upcycle.program import upcycle

__all__ = ["upcycle"]
