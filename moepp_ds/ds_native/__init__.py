"""From a checkpoint of DeepSpeed's own saver (`engine.save_checkpoint`) to a run that goes on from it, on any layout.

1. `reading`    no file is unpickled: torch's restricted reader makes tensors, containers and three records of numbers,
                for which it is given classes of this package; a file that wants more is refused, and all of it named
2. `folder`     the files of one tag; all ranks' and all experts' must be there, and no others
3. `states`     what a model's and an optimizer's state must hold
4. `partitions` under ZeRO 1 and 2 a group of parameters is one flat array, cut into equal partitions over the ranks
                that share it: all of them for dense parameters, those with the same experts for FFN experts. Which
                elements of which partition a parameter is follows from the shapes, and each rank must have noted it so
5. `checkpoint` parameters by their names there, experts under their numbers among all: fp32 weights, and AdamW's
                moments. Rounded to the dtype of the model, a weight must be what the model's own file holds: so files
                of two saves, or experts in another order, do not pass
6. `names`      which of our parameters they are: called as ours, as the released model's, or as a file of names says
7. `program`    the run folder, at the step of the checkpoint

ZeRO 0 keeps moments without the names of their parameters: weights alone come from it. ZeRO 3, tensor and pipeline
parallelism and AutoEP are refused by name.
"""

from __future__ import annotations

from moepp_ds.ds_native.program import import_deepspeed

__all__ = ["import_deepspeed"]
