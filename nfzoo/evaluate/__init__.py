"""Measure a model on labelled images: `evaluate(model, "photos/val")`."""

from nfzoo.evaluate.accuracy import EVALUATION_FILE, evaluate
from nfzoo.evaluate.labelled import open_labelled
from nfzoo.evaluate.multi_label import SetEvaluation, evaluate_sets
from nfzoo.evaluate.run import main
from nfzoo.evaluate.scores import Evaluation, Score, score, table

__all__ = [
    "EVALUATION_FILE",
    "Evaluation",
    "Score",
    "SetEvaluation",
    "evaluate",
    "evaluate_sets",
    "main",
    "open_labelled",
    "score",
    "table",
]
