"""Callbacks that keep what earlier tasks taught."""

from lightning_bd.callbacks.continual.elastic_weight_consolidation import ElasticWeightConsolidation

__all__ = ("ElasticWeightConsolidation",)
