"""Features of the networks of timm."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bd.functional.modes import mode
from lightning_bd.selection.network_encoder import NetworkEncoder, load_weights, read_weights

__all__ = ("TimmEncoder",)


class TimmEncoder(NetworkEncoder):
    """Features of a network of `timm <https://huggingface.co/docs/timm>`_, whose weights lie on disk.

    Nothing is downloaded. Images are resized as timm's data configuration of the network says (bicubic or bilinear;
    antialiased, nothing is cropped), normalised by its mean and standard deviation, grey ones repeated as three
    channels. Features are what the network makes for its classifier, whose own weights need not be in the file.

    Args:
        name: Of the network, as ``timm.list_models()`` has it, with or without a tag: ``"resnet50"``,
            ``"vit_small_patch14_dinov2.lvd142m"``. The tag says how images are normalised.
        weights: File with its ``state_dict``: ``model.safetensors`` of the Hugging Face hub, or one written by
            ``torch.save``, read with ``weights_only=True``.
        image_size: Height and width that images are resized to; ``None``: the configuration's.
        device: Where to compute.
        batch_size: Images at a time.

    Raises:
        MisconfigurationException: If timm is not installed.
        ValueError: If timm has no such network or tag, or a number is not positive; when used, if the file is broken,
            not to be trusted or of another network, or the network cannot take images of this size.
        FileNotFoundError: When used, if there is no such file.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path,
        image_size: int | None = None,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        if image_size is not None and image_size < 1:
            raise ValueError(f"Expected argument `image_size` to be a positive integer or None, but got {image_size}.")
        if not _is_known(_timm(), name):
            raise ValueError(
                f"Expected argument `name` to be a network of timm such as 'resnet50' or 'resnet50.a1_in1k', but got "
                f"{name!r}."
            )
        super().__init__(weights, device, batch_size)
        self.name = name
        self.image_size = image_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return ``(B, D)`` of images ``(B, 1 or 3, H, W)`` in [0, 1]."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Expected argument `images` to have 1 or 3 channels, but got {images.shape[1]}.")
        if self._network is None:
            self._network = self._build().to(self._device)
        settings = _timm().data.resolve_model_data_config(self._network)
        size = (self.image_size, self.image_size) if self.image_size is not None else tuple(settings["input_size"][1:])
        images = images.to(self._device)
        if images.shape[2:] != size:
            resampling = "bicubic" if settings["interpolation"] == "bicubic" else "bilinear"
            # A cubic overshoots.
            images = F.interpolate(images, size=size, mode=resampling, antialias=True).clamp(0, 1)
        mean, std = (images.new_tensor(settings[part])[:, None, None] for part in ("mean", "std"))
        with mode(self._network, training=False):
            found: Tensor = self._network((images.expand(-1, 3, -1, -1) - mean) / std)
        return found

    def _build(self) -> nn.Module:
        saved = read_weights(self.weights)
        # A new network draws its weights from torch's global stream, which others rely on.
        with torch.random.fork_rng(devices=[]):
            made = _timm().create_model(self.name, pretrained=False, num_classes=0)
        network: nn.Module = made
        settings: dict[str, Any] = made.pretrained_cfg
        heads = settings.get("classifier") or ()
        heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
        own = network.state_dict()
        load_weights(
            network,
            {name: tensor for name, tensor in saved.items() if name in own or not name.startswith(heads)},
            self.weights,
        )
        native = settings["input_size"][-1]
        if self.image_size not in (None, native) and settings.get("fixed_input_size"):
            if not hasattr(made, "set_input_size"):
                raise ValueError(
                    f"Expected argument `image_size` to be {native} or None, since {self.name} takes images of that "
                    f"size only, but got {self.image_size}."
                )
            made.set_input_size(img_size=self.image_size)
        return network


def _timm() -> ModuleType:
    try:
        # Imported here: it is an extra, and takes seconds.
        import timm
    except ImportError as error:
        raise MisconfigurationException(
            f"Install timm to use a `TimmEncoder`, `pip install lightning-bd[timm]`, or use another encoder: {error}"
        ) from error
    return timm


def _is_known(timm: ModuleType, name: str) -> bool:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        return False
    return not tag or name in timm.list_pretrained(f"{architecture}.*")
