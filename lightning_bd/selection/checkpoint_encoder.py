"""Features of a model that was trained before."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_bd.selection.network_encoder import NetworkEncoder, load_weights, read_weights

__all__ = ("CheckpointEncoder",)


class CheckpointEncoder(NetworkEncoder):
    """Features of a backbone that was trained before: a checkpoint of this library, of Lightning, or plain weights.

    Features are the input of the backbone's last linear layer.

    Args:
        backbone: The network, as in the config that it was trained with; its weights are replaced.
        weights: The checkpoint (``final.ckpt``, of which ``backbone.*`` is read) or a ``state_dict`` of the backbone;
            read with ``weights_only=True``.
        mean: Mean per channel that the model was trained with (``model.normalize``); ``None``: images stay in [0, 1].
        std: Standard deviation per channel.
        device: Where to compute.
        batch_size: Images at a time.

    Raises:
        ValueError: If only one of ``mean`` and ``std`` is given or they are not positive and equally long; when used,
            if the file is broken, not to be trusted or of another network.
        FileNotFoundError: When used, if there is no such file.
    """

    def __init__(
        self,
        backbone: nn.Module,
        weights: str | Path,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        device: str = "cpu",
        batch_size: int = 256,
    ) -> None:
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()) or not all(s > 0 for s in std or ()):
            raise ValueError(
                "Expected arguments `mean` and `std` to be both given, equally long and `std` positive, or both None, "
                f"but got mean {mean} and std {std}."
            )
        super().__init__(weights, device, batch_size)
        self.backbone = backbone
        self.mean = mean
        self.std = std

    def __call__(self, images: Tensor) -> Tensor:
        """Return ``(B, D)`` of images ``(B, C, H, W)`` in [0, 1]."""
        if self.mean is not None and self.std is not None:
            mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
            images = (images - mean) / std
        return super().__call__(images)

    def _build(self) -> nn.Module:
        saved = read_weights(self.weights)
        prefix = "backbone."
        own = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
        load_weights(self.backbone, own or saved, self.weights)
        return self.backbone
