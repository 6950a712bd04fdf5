"""Callbacks that drop into any Lightning project."""

from lightning_bd.callbacks.continual import (
    Anchoring,
    AveragedGradientEpisodicMemory,
    DarkExperienceReplay,
    ElasticWeightConsolidation,
    ExperienceReplay,
    FrozenRunningStatistics,
    LearningWithoutForgetting,
    MemoryAwareSynapses,
    ReplayBuffer,
    SynapticIntelligence,
)
from lightning_bd.callbacks.defense import (
    AdversarialNeuronPruning,
    BatchNormPruning,
    ChannelLipschitzPruning,
    DefenderData,
    Defense,
    EntropyPruning,
    FinePruning,
    FineTuning,
    ImplicitBackdoorAdversarialUnlearning,
    NeuralAttentionDistillation,
    NeuralCleanse,
    NotApplicableError,
    Report,
)
from lightning_bd.callbacks.flatness import SharpnessAwareMinimization
from lightning_bd.callbacks.loss_term import LossTerm

__all__ = (
    "AdversarialNeuronPruning",
    "Anchoring",
    "AveragedGradientEpisodicMemory",
    "BatchNormPruning",
    "ChannelLipschitzPruning",
    "DarkExperienceReplay",
    "DefenderData",
    "Defense",
    "ElasticWeightConsolidation",
    "EntropyPruning",
    "ExperienceReplay",
    "FinePruning",
    "FineTuning",
    "FrozenRunningStatistics",
    "ImplicitBackdoorAdversarialUnlearning",
    "LearningWithoutForgetting",
    "LossTerm",
    "MemoryAwareSynapses",
    "NeuralAttentionDistillation",
    "NeuralCleanse",
    "NotApplicableError",
    "ReplayBuffer",
    "Report",
    "SharpnessAwareMinimization",
    "SynapticIntelligence",
)
