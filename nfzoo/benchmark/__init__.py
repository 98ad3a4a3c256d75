"""Compare the ways to run a model on a CPU: how fast, how exact, how large. See `nfzoo benchmark`."""

from nfzoo.benchmark.contenders import CONTENDERS
from nfzoo.benchmark.measure import Result, compare

__all__ = ["CONTENDERS", "Result", "compare"]
