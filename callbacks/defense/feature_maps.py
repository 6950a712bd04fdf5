"""Finding the feature maps in which a network's stages end, by what a forward pass does, never by name."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_bd.callbacks.defense.base import NotApplicableError
from lightning_bd.callbacks.defense.layers import captured_outputs
from lightning_bd.functional.modes import mode

__all__ = ("FeatureMaps", "find_feature_maps", "named_feature_maps")

# What only prepares the map that an activation, a block or a whole stage then gives.
_PARTS = (
    nn.Conv2d, nn.ConvTranspose2d, _BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d, nn.Dropout, nn.Dropout2d,
    nn.Identity,
)  # fmt: skip
_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class FeatureMaps:
    """Some outputs of a forward pass, for the network they were found in and for copies of it.

    Attributes:
        layers: Qualified names of the modules that give them, in the order of the features.
        positions: Where each one is among all that these modules give, in order: a module may run more than once.
    """

    layers: tuple[str, ...]
    positions: tuple[int, ...]

    def read(self, model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits and the features of each layer, with their graphs.

        Args:
            model: The network or a copy of it; compiled parts run as they were written.
            images: ``(B, C, H, W)`` in [0, 1].
        """
        modules = [model.get_submodule(name) for name in dict.fromkeys(self.layers)]
        with captured_outputs(*modules) as outputs:
            logits: Tensor = model(images)
        return logits, [outputs[position] for position in self.positions]


def find_feature_maps(model: nn.Module, images: Tensor, count: int) -> FeatureMaps:
    """Find the last maps ``(B, C, H, W)`` of a network's last stages, or tokens ``(B, N, D)`` of a transformer.

    In a convolutional network each spatial resolution is a stage. Of the maps at a resolution the last one of the
    outermost modules is taken: a stage, block or activation, where there is one, rather than what the next stage begins
    with. Maps of a single position, and those that depend on no trainable parameter, are left out. In a vision
    transformer evenly spaced blocks are taken, the last one among them. Networks whose maps have the channels last,
    such as Swin, are not read but where they change to ``(B, C, H, W)``.

    Args:
        model: Maps images to logits ``(B, K)``; runs in evaluation mode, every mode is put back.
        images: ``(B, C, H, W)`` in [0, 1]; two are enough.
        count: Number of maps, at least 1; fewer are found if there are fewer.

    Raises:
        NotApplicableError: If there is none.

    Example:
        >>> from lightning_bd.backbones import resnet18
        >>> find_feature_maps(resnet18(10, width=4), torch.rand(2, 3, 32, 32), 3).layers
        ('layer2', 'layer3', 'layer4')
    """
    outputs = _record(model, images)
    blocks = _token_blocks(outputs)
    spatial = _spatial_maps(outputs, images.shape)
    # The patches that a transformer starts from are a map too, and a convolutional network may flatten its last.
    if blocks and (not spatial or blocks[-1].place > spatial[-1].place):
        count = min(count, len(blocks))
        return _feature_maps(
            [blocks[math.ceil(len(blocks) * part / count) - 1] for part in range(1, count + 1)], outputs
        )
    if not spatial:
        raise NotApplicableError(
            "Attention needs feature maps (B, C, H, W) of more than one position, or blocks of tokens (B, N, D), that "
            "trainable parameters change, but the model gives none. If there are some, name them in `layers`."
        )
    return _feature_maps(spatial[-count:], outputs)


def named_feature_maps(model: nn.Module, images: Tensor, layers: Sequence[str]) -> FeatureMaps:
    """Return the outputs of modules given by name; of one that runs more than once, the last.

    Args:
        model: As in :func:`find_feature_maps`.
        images: ``(B, C, H, W)`` in [0, 1]; two are enough.
        layers: Qualified names.

    Raises:
        MisconfigurationException: If there is no module of a name.
        NotApplicableError: If one gives neither maps ``(B, C, H, W)`` nor tokens ``(B, N, D)`` of several positions.
    """
    names = [name for name, _ in model.named_modules()]
    for name in layers:
        if name not in names:
            endings = [other for other in names if other.endswith(f".{name}")]
            close = endings or difflib.get_close_matches(name, names, cutoff=0.5) or names[1:]
            raise MisconfigurationException(
                f"Change `{name}` in `layers`: the model has no such module. Close: {', '.join(close[:5])}."
            )
    outputs = _record(model, images)
    chosen = []
    for name in layers:
        given = [output for output in outputs if output.name == name]
        shape = tuple(given[-1].shape) if given else ()
        if {3: shape[1:2], 4: shape[2:]}.get(len(shape), ()) in ((), (1,), (1, 1)):
            raise NotApplicableError(
                f"The output of layer `{name}` must be feature maps (B, C, H, W) or tokens (B, N, D) of more than one "
                f"position, but is {shape or 'no tensor'}."
            )
        chosen.append(given[-1])
    return _feature_maps(chosen, outputs)


@dataclass(frozen=True)
class _Output:
    """A tensor that a module gave: the ``place``-th of the forward pass."""

    place: int
    name: str
    module: nn.Module
    shape: torch.Size
    trainable: bool


def _record(model: nn.Module, images: Tensor) -> list[_Output]:
    """Return what every module gives, in order; the model itself comes last."""
    outputs: list[_Output] = []
    handles = []
    for name, module in model.named_modules():

        def keep(module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor):
                outputs.append(_Output(len(outputs), name, module, output.shape, output.requires_grad))

        handles.append(module.register_forward_hook(keep))
    try:
        # A compiled module would not call the hooks of its parts.
        with mode(model, training=False), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _feature_maps(chosen: list[_Output], outputs: list[_Output]) -> FeatureMaps:
    names = tuple(output.name for output in chosen)
    places = [output.place for output in outputs if output.name in names]
    return FeatureMaps(names, tuple(places.index(output.place) for output in chosen))


def _spatial_maps(outputs: list[_Output], image_shape: torch.Size) -> list[_Output]:
    """Return one feature map for each resolution, in order."""
    found: dict[torch.Size, tuple[tuple[bool, int], _Output]] = {}
    for output in outputs:
        if output.trainable and _is_map(output) and _keeps_aspect(output.shape, image_shape):
            rank = (not isinstance(output.module, _PARTS), -output.name.count("."))
            if output.shape[2:] not in found or rank >= found[output.shape[2:]][0]:
                found[output.shape[2:]] = (rank, output)
    return sorted((output for _, output in found.values()), key=lambda output: output.place)


def _is_map(output: _Output) -> bool:
    shape = output.shape
    return len(shape) == 4 and shape[2] * shape[3] > 1 and not isinstance(output.module, _POOLING)


def _keeps_aspect(shape: torch.Size, image_shape: torch.Size) -> bool:
    """Whether height and width are the image's, scaled; they are not if the last dimension is the channels."""
    (height, width), (image_height, image_width) = shape[2:], image_shape[2:]
    scale = math.sqrt(height * width / (image_height * image_width))
    return abs(height - scale * image_height) <= 1 and abs(width - scale * image_width) <= 1


def _token_blocks(outputs: list[_Output]) -> list[_Output]:
    """Return the blocks of a transformer: siblings of one class, at least two, whose outputs are tokens alike."""
    groups: dict[tuple[str, type[nn.Module], torch.Size], list[_Output]] = {}
    for output in outputs:
        shape = output.shape
        tokens = len(shape) == 3 and shape[0] == outputs[-1].shape[0] and shape[1] > 1
        if tokens and output.trainable and any(output.module.children()):
            parent = output.name.rpartition(".")[0]
            groups.setdefault((parent, type(output.module), shape), []).append(output)
    largest = max(groups.values(), key=len, default=[])
    return largest if len(largest) > 1 else []
