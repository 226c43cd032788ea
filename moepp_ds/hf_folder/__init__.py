"""Model folders as Hugging Face publishes them.

* `reading` `HFFolder`: config, tensors one by one, tokenizer files; runs nothing that a folder holds
* `checks`  whether its tensors are those of a model, and what identifies it
* `writing` `write_folder`: complete or absent
"""

from __future__ import annotations

from moepp_ds.hf_folder.checks import identity, tensor_problems
from moepp_ds.hf_folder.reading import FolderError, HFFolder
from moepp_ds.hf_folder.writing import write_folder

__all__ = ["FolderError", "HFFolder", "identity", "tensor_problems", "write_folder"]
