"""Averaged weights: the averaged models, and the plugins ``ema`` and ``swa`` that use them."""

from hookengine_averaging.averaged import (
    BaseAveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from hookengine_averaging.ema import Ema
from hookengine_averaging.swa import Swa

__all__ = [
    "BaseAveragedModel",
    "Ema",
    "ExponentialMovingAverage",
    "MomentumAnnealingEMA",
    "StochasticWeightAverage",
    "Swa",
]
