"""Train and fine-tune: `train(TrainConfig(model="nfnet-f0", data="photos", output="runs/photos"))`.

The package can be called as its function can: `nfzoo.train(config)`.
"""

import sys
from collections.abc import Sequence
from types import ModuleType

from nfzoo.train.config import TrainConfig
from nfzoo.train.run import Result, main, train

__all__ = ["TrainConfig", "main", "train"]


class _Package(ModuleType):
    def __call__(self, config: TrainConfig, *, callbacks: Sequence[object] = ()) -> Result:
        return train(config, callbacks=callbacks)


sys.modules[__name__].__class__ = _Package
