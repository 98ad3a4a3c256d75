"""Find a learning rate and an AGC threshold before training: `find_rates(TrainConfig(…))`, `nfzoo find-lr`."""

from nfzoo.tuner.curves import Curve
from nfzoo.tuner.range_test import find_rates

__all__ = ["Curve", "find_rates"]
