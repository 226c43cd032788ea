"""From a checkpoint to a folder as Hugging Face publishes them: weights, config, code, tokenizer and model card.

* `program`   puts them together, streaming the weights
* `tokenizer` files that make `AutoTokenizer` give the ids of training
* `card`      README.md
"""

from __future__ import annotations

from moepp_ds.hf_export.program import Exported, export_checkpoint, parse_size

__all__ = ["Exported", "export_checkpoint", "parse_size"]
