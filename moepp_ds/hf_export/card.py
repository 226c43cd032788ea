"""README.md of an exported folder: what the model is, how it was trained, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepp_ds.config import Recipe, count_parameters
from moepp_ds.hf_names import Layout

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- moe
- moepp_ds
license: # fill in before you publish; the licences of the training text and of the code bear on it
---

# {name}

A causal language model with a mixture of heterogeneous experts (MoE++, arXiv 2410.07348), trained with moepp_ds.

| | |
|---|---|
{facts}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
{encode}
print({decode}(model.generate(ids, max_new_tokens=64)[0]))
```

`trust_remote_code=True` runs the two Python files of this folder; with moepp_ds installed, `import moepp_ds.hf` does
in its place. {tokens}

Every token gets all experts that it chose: there are no seats and no drops outside of training.{documents}

## Training

{training}

## Recipe

```yaml
{recipe}```
"""

ENCODE = """tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids"""
TOKENS = (
    "No token is put before a text, and special tokens written in a text are text: that is how the training text was"
    " encoded. For a batch of texts, set `tokenizer.pad_token = tokenizer.eos_token`, pad on the left"
    " (`padding_side=\"left\"`) and pass the attention mask."
)
OTHERWISE = "ids = ...  # see below; shape [texts, tokens]"
DOCUMENTS = (
    " In training attention stopped at the end-of-document token. Here a row is one document; rows that pack several"
    " need `position_ids` that start anew in each, no attention mask and `use_cache=False`."
)


def model_card(
    recipe: Recipe, index: Mapping[str, Any], *, name: str, layout: Layout, dtype: str, notice: str | None
) -> str:
    """The card, from the recipe and the checkpoint's index. notice: what is to be known of the tokenizer."""
    facts = {**_facts(recipe), "Layout": f"{layout}, {dtype}"}
    return CARD.format(
        name=name,
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        encode=OTHERWISE if notice else ENCODE.format(name=name),
        decode="" if notice else "tokenizer.decode",
        tokens=f"{notice}." if notice else TOKENS,
        documents=DOCUMENTS if recipe.model.document_attention else "",
        training="\n".join(f"* {line}" for line in _training(recipe, index)),
        recipe=_without_places(recipe).dump(),
    )


def _without_places(recipe: Recipe) -> Recipe:
    """The recipe with names for its paths: a card is published, and folders of a machine are nobody's business."""
    raw = recipe.data.raw
    if raw is not None:
        names = {corpus: Path(location).name for corpus, location in raw.corpora.items()}
        raw = raw.model_copy(update={**names, "tokenizer": Path(raw.tokenizer).name})
    data = recipe.data.model_copy(update={"path": Path(recipe.data.path).name, "raw": raw})
    return recipe.model_copy(update={"deepspeed": Path(recipe.deepspeed).name, "data": data})


def _facts(recipe: Recipe) -> dict[str, str]:
    model, moe, counts = recipe.model, recipe.model.moe, count_parameters(recipe.model)
    shared = f", {moe.num_shared_experts} shared" if moe.num_shared_experts else ""
    choice = f"top {moe.top_k}" if moe.top_k else f"threshold {moe.router.threshold:g}"
    return {
        "Parameters": f"{counts.total:,}, of them {counts.activated:,} activated per token as planned",
        "Layers": f"{model.num_layers}, {model.num_moe_layers} of them MoE; width {model.hidden_size}",
        "Experts of a layer": f"{moe.num_ffn_experts} FFN of width {model.expert_ffn_hidden_size}, {moe.num_constant} "
        f"constant, {moe.num_copy} copy, {moe.num_zero} zero{shared}; {choice}",
        "Attention": f"{model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} for keys and values; trained "
        f"on rows of {recipe.data.seq_len} tokens",
        "Vocabulary": f"{model.vocab_size:,}",
    }


def _shares(quotas: Mapping[str, int]) -> str:
    total = sum(quotas.values())
    return ", ".join(f"{source} {100 * quota / total:g} %" for source, quota in quotas.items())


def _training(recipe: Recipe, index: Mapping[str, Any]) -> list[str]:
    """What happened, as the checkpoint tells it."""
    lines = [f"{index['step']:,} of {recipe.total_steps:,} updates, {index.get('tokens', 0):,} tokens"]
    data = index.get("data")
    if data:
        stages = data["order"].get("stages") or [[0, data["order"]["mixture"]]]
        drawn = [
            (f"from row {start:,} on " if start else "") + _shares(quotas)
            for start, quotas in stages
            if not start or start < data["rows"]
        ]
        lines.append(f"tokens were drawn from {'; '.join(drawn)}")
    origin = index.get("origin") or {}
    if "from" in origin:
        named = ", ".join(f"{Path(one['folder']).name} ({one['model_type']})" for one in origin["from"])
        lines.append(f"it started from other weights: {origin['program']} of {named}")
    versions = ", ".join(f"{package} {number}" for package, number in (index.get("versions") or {}).items())
    return [*lines, f"versions: {versions}"] if versions else lines
