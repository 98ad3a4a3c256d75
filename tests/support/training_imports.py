"""Import what a training needs, for processes that are forked from one that has done so: see `processes.py`."""

import accelerate
import torch.distributed.fsdp
import torch.distributed.tensor

import nfzoo.train.run

__all__ = ["accelerate", "nfzoo", "torch"]
