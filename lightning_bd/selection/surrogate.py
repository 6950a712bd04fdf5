"""A model of the attacker's own, from whose training difficulties are read off."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lightning_bd.backbones import resnet18
from lightning_bd.functional.draws import keyed_generator, keyed_global_state
from lightning_bd.functional.modes import mode

__all__ = ("Surrogate",)


class Surrogate:
    """How the attacker trains a model on clean images: a plain loop of SGD, the same for the same images and arguments.

    Images are normalised by their own mean and standard deviation per channel and not augmented; the learning rate
    falls along a cosine. A last batch of one image is left out of its epoch.

    Args:
        backbone: Makes the network from the numbers of classes and channels.
        epochs: Number of epochs, at least 1.
        lr: Learning rate of the first epoch, positive.
        momentum: In [0, 1).
        weight_decay: Not negative.
        batch_size: Images per step, at least 2.
        seed: Of initial weights and order.
        device: Where to train.
        backbone_arguments: Further arguments of ``backbone``, such as ``width: 16`` of the residual networks.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> from lightning_bd.backbones import small_cnn
        >>> images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 2
        >>> network = Surrogate(small_cnn, epochs=1).train(images, labels)
        >>> network(images).shape
        torch.Size([20, 2])
    """

    def __init__(
        self,
        backbone: Callable[..., nn.Module] = resnet18,
        epochs: int = 30,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        batch_size: int = 128,
        seed: int = 0,
        device: str = "cpu",
        backbone_arguments: dict[str, int | float | str | bool] | None = None,
    ) -> None:
        for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 2)):
            if value < least:
                raise ValueError(f"Expected argument `{name}` to be an integer of at least {least}, but got {value}.")
        if not lr > 0:
            raise ValueError(f"Expected argument `lr` to be a positive float, but got {lr}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"Expected argument `momentum` to be a float in [0, 1), but got {momentum}.")
        if not weight_decay >= 0:
            raise ValueError(f"Expected argument `weight_decay` to be a non-negative float, but got {weight_decay}.")
        self.backbone = backbone
        self.backbone_arguments = dict(backbone_arguments or {})
        self.epochs = epochs
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.seed = seed
        # Not under the argument's name: where it is trained does not make it another model.
        self._device = torch.device(device)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def train(
        self,
        images: Tensor,
        labels: Tensor,
        note: Callable[[Tensor, Tensor], None] | None = None,
        perturb: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    ) -> nn.Module:
        """Train a new network; the global random streams are put back.

        Args:
            images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1], at least 2.
            labels: ``(N,)`` int64.
            note: Called in each step, before the weights move, with the rows ``(B,)`` of ``images`` that the step is of
                and the logits ``(B, K)`` that the network, in training mode, gave them; both on the CPU.
            perturb: Called in each step with the network, its images ``(B, C, H, W)`` float32 and their labels; what it
                returns is trained on in their place, for adversarial training.

        Returns:
            The network, in evaluation mode; it maps images in [0, 1] to logits.

        Raises:
            ValueError: If there are fewer than two images, or the loss does not stay finite.
        """
        if len(images) < 2:
            raise ValueError(f"Expected at least 2 images to train a surrogate on, but got {len(images)}.")
        with keyed_global_state(self.seed, "surrogate", device=self._device):
            backbone = self.backbone(int(labels.max()) + 1, images.shape[1], **self.backbone_arguments)
            network = nn.Sequential(_Normalize(*self._statistics(images)), backbone).to(self._device)
            self._fit(network, images, labels, note, perturb)
        return network.eval()

    @torch.no_grad()
    def predict(self, network: nn.Module, images: Tensor, function: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """Apply a function of a network and images batch by batch, in evaluation mode.

        Args:
            network: Of :meth:`train`.
            images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1].
            function: Of the network and ``(B, C, H, W)`` float32 to ``(B, ...)``.

        Returns:
            ``(N, ...)`` on the CPU.
        """
        with mode(network, training=False):
            return torch.cat([function(network, batch).cpu() for _, batch in self._batches(images, None)])

    def _fit(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        note: Callable[[Tensor, Tensor], None] | None,
        perturb: Callable[[nn.Module, Tensor, Tensor], Tensor] | None,
    ) -> None:
        network.train()
        optimizer = torch.optim.SGD(
            network.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        for epoch in tqdm(range(self.epochs), "surrogate", leave=False, delay=3):
            generator = keyed_generator(self.seed, "surrogate order", epoch)
            order = torch.randperm(len(images), generator=generator)
            total = torch.zeros((), device=self._device)
            for rows, batch in self._batches(images, order):
                if len(rows) == 1:
                    continue
                wanted = labels[rows].to(self._device)
                logits = network(batch if perturb is None else perturb(network, batch, wanted))
                loss = F.cross_entropy(logits, wanted)
                if note is not None:
                    note(rows, logits.detach().cpu())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach()
            if not bool(total.isfinite()):
                raise ValueError(f"The surrogate's loss is not finite after epoch {epoch}. Lower its `lr` ({self.lr}).")
            schedule.step()

    def _batches(self, images: Tensor, order: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(images)) if order is None else order
        for rows in torch.split(order, self.batch_size):
            batch = images[rows].to(self._device)
            yield rows, batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(2, images.shape[1], dtype=torch.float64, device=self._device)
        for _, batch in self._batches(images, None):
            wide = batch.double()
            sums += torch.stack([wide.sum(dim=(0, 2, 3)), wide.square().sum(dim=(0, 2, 3))])
        mean, square = sums / (len(images) * images[0, 0].numel())
        # A channel that is the same everywhere has no deviation to divide by.
        std = (square - mean.square()).clamp_min(0).sqrt().clamp_min(1e-3)
        return mean.float(), std.float()


class _Normalize(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean[:, None, None])
        self.register_buffer("std", std[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
