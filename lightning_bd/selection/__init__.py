"""Scores that choose the samples to poison."""

from lightning_bd.selection.base import SampleScorer, Selection
from lightning_bd.selection.checkpoint_encoder import CheckpointEncoder
from lightning_bd.selection.encoders import Encoder, RawPixels
from lightning_bd.selection.forgetting_events import ForgettingEvents
from lightning_bd.selection.gradient_norm import GradientNorm
from lightning_bd.selection.knn_typicality import KNNTypicality
from lightning_bd.selection.loss_score import LossScore
from lightning_bd.selection.mean_typicality import MeanTypicality
from lightning_bd.selection.ood_loss import OODLoss
from lightning_bd.selection.random import RandomSelection
from lightning_bd.selection.self_supervised_encoder import SelfSupervisedEncoder
from lightning_bd.selection.surrogate import Surrogate
from lightning_bd.selection.timm_encoder import TimmEncoder
from lightning_bd.selection.torchvision_encoder import TorchvisionEncoder

__all__ = (
    "CheckpointEncoder",
    "Encoder",
    "ForgettingEvents",
    "GradientNorm",
    "KNNTypicality",
    "LossScore",
    "MeanTypicality",
    "OODLoss",
    "RandomSelection",
    "RawPixels",
    "SampleScorer",
    "Selection",
    "SelfSupervisedEncoder",
    "Surrogate",
    "TimmEncoder",
    "TorchvisionEncoder",
)
