"""Measure a model on labelled images: `evaluate(model, "photos/val")`."""

from nfzoo.evaluate.accuracy import EVALUATION_FILE, Evaluation, evaluate, table
from nfzoo.evaluate.labelled import open_labelled
from nfzoo.evaluate.run import main
from nfzoo.evaluate.scores import Score, score

__all__ = ["EVALUATION_FILE", "Evaluation", "Score", "evaluate", "main", "open_labelled", "score", "table"]
