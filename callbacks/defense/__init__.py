"""Defenses: try to remove a backdoor with a little clean data."""

from lightning_bd.callbacks.defense.adversarial_neuron_pruning import AdversarialNeuronPruning
from lightning_bd.callbacks.defense.base import DefenderData, Defense, NotApplicableError, Report
from lightning_bd.callbacks.defense.batch_norm_pruning import BatchNormPruning
from lightning_bd.callbacks.defense.channel_lipschitz_pruning import ChannelLipschitzPruning
from lightning_bd.callbacks.defense.entropy_pruning import EntropyPruning
from lightning_bd.callbacks.defense.fine_pruning import FinePruning
from lightning_bd.callbacks.defense.fine_tuning import FineTuning
from lightning_bd.callbacks.defense.implicit_backdoor_adversarial_unlearning import (
    ImplicitBackdoorAdversarialUnlearning,
)
from lightning_bd.callbacks.defense.neural_attention_distillation import NeuralAttentionDistillation
from lightning_bd.callbacks.defense.neural_cleanse import NeuralCleanse

__all__ = (
    "AdversarialNeuronPruning",
    "BatchNormPruning",
    "ChannelLipschitzPruning",
    "DefenderData",
    "Defense",
    "EntropyPruning",
    "FinePruning",
    "FineTuning",
    "ImplicitBackdoorAdversarialUnlearning",
    "NeuralAttentionDistillation",
    "NeuralCleanse",
    "NotApplicableError",
    "Report",
)
