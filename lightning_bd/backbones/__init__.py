"""Networks of the field for small images: functions that return a module mapping images to logits."""

from lightning_bd.backbones.preact_resnet import preact_resnet18, preact_resnet34
from lightning_bd.backbones.resnet import resnet18, resnet20, resnet34
from lightning_bd.backbones.small_cnn import small_cnn
from lightning_bd.backbones.vgg import vgg11_bn, vgg16_bn
from lightning_bd.backbones.wide_resnet import wide_resnet

__all__ = (
    "preact_resnet18",
    "preact_resnet34",
    "resnet18",
    "resnet20",
    "resnet34",
    "small_cnn",
    "vgg11_bn",
    "vgg16_bn",
    "wide_resnet",
)
