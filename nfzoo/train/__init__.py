"""Train and fine-tune: `train(TrainConfig(model="nfnet-f0", data="photos", output="runs/photos"))`."""

from nfzoo.train.config import TrainConfig
from nfzoo.train.run import main, train

__all__ = ["TrainConfig", "main", "train"]
