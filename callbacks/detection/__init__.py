"""Detectors of suspicious images, one file per method."""

from lightning_bd.callbacks.detection.activation_clustering import ActivationClustering
from lightning_bd.callbacks.detection.ash import ASH
from lightning_bd.callbacks.detection.badexpert import BaDExpert
from lightning_bd.callbacks.detection.base import DatasetDetector, Detector, FeatureDetector, InputDetector
from lightning_bd.callbacks.detection.class_typical_matching import ClassTypicalMatching
from lightning_bd.callbacks.detection.cognitive_distillation import CognitiveDistillation
from lightning_bd.callbacks.detection.energy import Energy
from lightning_bd.callbacks.detection.features import Head
from lightning_bd.callbacks.detection.gen import GEN
from lightning_bd.callbacks.detection.k_nearest_neighbors import KNearestNeighbors
from lightning_bd.callbacks.detection.mahalanobis import Mahalanobis
from lightning_bd.callbacks.detection.max_logit import MaxLogit
from lightning_bd.callbacks.detection.maximum_softmax_probability import MaximumSoftmaxProbability
from lightning_bd.callbacks.detection.odin import ODIN
from lightning_bd.callbacks.detection.pytorch_ood import PyTorchOOD
from lightning_bd.callbacks.detection.react import ReAct
from lightning_bd.callbacks.detection.relative_mahalanobis import RelativeMahalanobis
from lightning_bd.callbacks.detection.scale_up import ScaleUp
from lightning_bd.callbacks.detection.scan import SCAn
from lightning_bd.callbacks.detection.spectral_signatures import SpectralSignatures
from lightning_bd.callbacks.detection.strip import STRIP
from lightning_bd.callbacks.detection.vim import ViM

__all__ = (
    "ASH",
    "GEN",
    "ODIN",
    "STRIP",
    "ActivationClustering",
    "BaDExpert",
    "ClassTypicalMatching",
    "CognitiveDistillation",
    "DatasetDetector",
    "Detector",
    "Energy",
    "FeatureDetector",
    "Head",
    "InputDetector",
    "KNearestNeighbors",
    "Mahalanobis",
    "MaxLogit",
    "MaximumSoftmaxProbability",
    "PyTorchOOD",
    "ReAct",
    "RelativeMahalanobis",
    "SCAn",
    "ScaleUp",
    "SpectralSignatures",
    "ViM",
)
