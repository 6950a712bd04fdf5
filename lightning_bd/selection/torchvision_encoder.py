"""Features of torchvision's networks."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from lightning_bd.selection.network_encoder import NetworkEncoder, load_weights, read_weights

__all__ = ("TorchvisionEncoder",)

# Of ImageNet, which torchvision's classifiers and most self-supervised ones were trained with.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class TorchvisionEncoder(NetworkEncoder):
    """Features of a network of torchvision, whose weights lie on disk; nothing is downloaded.

    Images are resized (bilinear, antialiased), normalised by ImageNet's mean and standard deviation, grey ones repeated
    as three channels. Features are the input of the network's last linear layer, whose own weights need not be in the
    file: those of a self-supervised ResNet-50 fit.

    Args:
        name: Of the network, as ``torchvision.models.get_model`` has it.
        weights: File with its ``state_dict``, written by ``torch.save``; read with ``weights_only=True``.
        image_size: Height and width that images are resized to; the paper's release has 224.
        device: Where to compute.
        batch_size: Images at a time.

    Raises:
        ValueError: If torchvision has no such network, or a number is not positive; when used, if the file is broken,
            not to be trusted or of another network.
        FileNotFoundError: When used, if there is no such file.
    """

    def __init__(
        self, name: str, weights: str | Path, image_size: int = 224, device: str = "cpu", batch_size: int = 64
    ) -> None:
        if name not in models.list_models(module=models):
            raise ValueError(
                f"Expected argument `name` to be a classifier of torchvision.models such as 'resnet50', but got "
                f"{name!r}."
            )
        if image_size < 1:
            raise ValueError(f"Expected argument `image_size` to be a positive integer, but got {image_size}.")
        super().__init__(weights, device, batch_size)
        self.name = name
        self.image_size = image_size

    def __call__(self, images: Tensor) -> Tensor:
        """Return ``(B, D)`` of images ``(B, 1 or 3, H, W)`` in [0, 1]."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Expected argument `images` to have 1 or 3 channels, but got {images.shape[1]}.")
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return super().__call__((images.cpu().expand(-1, 3, -1, -1) - mean) / std)

    def _build(self) -> nn.Module:
        saved = read_weights(self.weights)
        # A new network draws its weights from torch's global stream, which others rely on.
        with torch.random.fork_rng(devices=[]):
            network: nn.Module = models.get_model(self.name, weights=None)
        head = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)][-1:]
        free = {f"{name}.{part}" for name in head for part in ("weight", "bias")}
        # The head's size is that of other classes, or it is not there: features do not depend on it.
        kept = {name: tensor for name, tensor in saved.items() if name not in free}
        own = {name: tensor for name, tensor in network.state_dict().items() if name in free}
        load_weights(network, {**kept, **own}, self.weights)
        return network
