"""A program that knows transformers and exported folders, and neither moepp_ds nor data_pipeline.

    python -I hf_reader.py REQUEST.json ANSWER.json

REQUEST: {"folders": {name: path}, "tokens": [[ids]], "texts": [...], "new": N}. ANSWER, for each folder: the logits of
the tokens, greedy continuations of the first row with the cache and beside a longer row with padding on the left,
what the tokenizer makes of the texts, and the dtypes that were loaded.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any


class Blocked(importlib.abc.MetaPathFinder):
    """Refuses what an exported folder may not need."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in ("moepp_ds", "data_pipeline", "deepspeed"):
            raise ImportError(f"{name} is blocked here")


def answer(folder: str, request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokens_BS = torch.tensor(request["tokens"])
    short, pad = tokens_BS[:1, 5:], model.generation_config.pad_token_id
    padded = torch.cat([torch.full((1, 5), pad), short], dim=1)
    batch = torch.cat([tokens_BS[1:2], padded])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    with torch.no_grad():
        logits_BSV = model(tokens_BS).logits
        single = model.generate(short, max_new_tokens=request["new"], do_sample=False)
        both = model.generate(batch, attention_mask=mask, max_new_tokens=request["new"], do_sample=False)
    return {
        "class": type(model).__name__,
        "logits": logits_BSV.float().tolist(),
        "single": single[0, short.shape[1] :].tolist(),
        "padded": both[1, batch.shape[1] :].tolist(),
        "ids": [tokenizer(text)["input_ids"] for text in request["texts"]],
        "eos": [model.config.eos_token_id, tokenizer.eos_token_id, pad],
        "dtypes": sorted({str(tensor.dtype) for tensor in model.state_dict().values()}),
    }


def main() -> None:
    sys.meta_path.insert(0, Blocked())
    request = json.loads(Path(sys.argv[1]).read_text())
    answers = {name: answer(folder, request) for name, folder in request["folders"].items()}
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
