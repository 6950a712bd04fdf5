"""Callbacks that keep what earlier tasks taught."""

from lightning_bd.callbacks.continual.anchoring import Anchoring
from lightning_bd.callbacks.continual.averaged_gradient_episodic_memory import AveragedGradientEpisodicMemory
from lightning_bd.callbacks.continual.dark_experience_replay import DarkExperienceReplay
from lightning_bd.callbacks.continual.elastic_weight_consolidation import ElasticWeightConsolidation
from lightning_bd.callbacks.continual.experience_replay import ExperienceReplay
from lightning_bd.callbacks.continual.frozen_statistics import FrozenRunningStatistics
from lightning_bd.callbacks.continual.learning_without_forgetting import LearningWithoutForgetting
from lightning_bd.callbacks.continual.memory_aware_synapses import MemoryAwareSynapses
from lightning_bd.callbacks.continual.replay_buffer import ReplayBuffer
from lightning_bd.callbacks.continual.synaptic_intelligence import SynapticIntelligence

__all__ = (
    "Anchoring",
    "AveragedGradientEpisodicMemory",
    "DarkExperienceReplay",
    "ElasticWeightConsolidation",
    "ExperienceReplay",
    "FrozenRunningStatistics",
    "LearningWithoutForgetting",
    "MemoryAwareSynapses",
    "ReplayBuffer",
    "SynapticIntelligence",
)
