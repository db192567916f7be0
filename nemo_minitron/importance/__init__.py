"""Scoring: what each unit and layer of a sharded model is worth, by forward passes over calibration data."""

from nemo_minitron.importance.block_influence import BlockInfluenceCollector
from nemo_minitron.importance.collectors import ImportanceCollector
from nemo_minitron.importance.scores import Scores

__all__ = ["BlockInfluenceCollector", "ImportanceCollector", "Scores"]
