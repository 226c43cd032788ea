"""Checkpoints that belong to no layout.

A checkpoint is the model as one list of named flat arrays, whatever ranks it came from. Under ZeRO each
rank owns, of some parameters, a range of the fp32 weight and of AdamW's two moments. It writes these
fragments under the parameter's global name and the range's place in the global, flattened parameter; a
stacked parameter of FFN experts is global over all experts, so expert parallelism only shifts the place. A
rank that loads reads whatever ranges it now owns.

    checkpoints/step-00000200/            made as .step-00000200.partial, renamed when complete
        index.json                        format, step, recipe, data position, parameter sizes, kinds stored,
                                          fingerprints of every weight and FFN expert, checksums of every chunk
                                          of every file, and of itself
        rank-00000-of-00002.safetensors   tensors `weight|<name>|<start>`, `exp_avg|...`, `exp_avg_sq|...`,
                                          all of them 1-D and fp32
    checkpoints/latest                    the name of the newest complete one

A checkpoint may hold weights alone, as one made from another model's weights does (`kinds` in its index; files
part-00000.safetensors and so on): a run goes on from it with an optimizer that is new.

What fails on one rank fails on all: a save that fails leaves the checkpoints before it as they were, and a
load that is refused can be tried again with another checkpoint. No file holds a pickle, and loading runs no code.

* `chunks`    files in chunks with checksums, proven when written and checked when read
* `tensors`   tensors in such files, by parameter and range
* `files`     a checkpoint's folder and index
* `retention` which ones are deleted, and how
* `shapes`    the parameters that a recipe's model has
* `fingerprints` of weights and experts, added up over ranks
* `verify`    all that is wrong with a checkpoint
* `compare`   what differs between two
* `writer`    a checkpoint of weights alone, from one process, piece by piece
* `weights`   the weights of a checkpoint, read by one process without an engine
* `fragments` the live optimizer as fragments, the one part that knows DeepSpeed's
* `live`      saving and loading on all ranks
"""

from __future__ import annotations

from moepp_ds.checkpoint.errors import CheckpointError, DamagedCheckpoint

__all__ = ["CheckpointError", "DamagedCheckpoint"]
