"""Features of a network that the attacker trains without labels."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import Normalize
from tqdm.auto import tqdm

from lightning_bd.backbones import resnet18
from lightning_bd.cache import cache_folder, content_key, keep_tensors, read_tensors
from lightning_bd.description import Description, describe
from lightning_bd.functional.augmented_view import augmented_view
from lightning_bd.functional.draws import keyed_generator, keyed_global_state
from lightning_bd.functional.modes import mode
from lightning_bd.image_files import read_images
from lightning_bd.selection.digests import image_digests, to_bytes
from lightning_bd.selection.encoders import Encoder
from lightning_bd.selection.network_encoder import penultimate

__all__ = ("Precision", "SelfSupervisedEncoder")

Precision = Literal["float32", "bfloat16"]

#: Part of every fingerprint; to be raised when the same arguments give other weights.
_VERSION = 1


class SelfSupervisedEncoder(Encoder):
    """Features of a network trained without labels on the attacker's own images: SimCLR, with the library lightly.

    `SimCLR <https://arxiv.org/abs/2002.05709>`_ makes two random views of an image alike and those of different images
    different: it minimises NT-Xent behind a projection head (two layers, batch normalisation, 128 outputs), which is
    dropped afterwards. The views are those of :func:`~lightning_bd.functional.augmented_view.augmented_view`. The
    network is trained on the images that :meth:`features` is asked for, those that may be poisoned, and on ``images``;
    equal ones count once. Features are the input of its last linear layer, in evaluation mode.

    The same images, in any order, and arguments give the same weights on the same processor. They are kept as
    safetensors in ``encoders`` below ``$LIGHTNING_BD_CACHE``, else below ``~/.cache/lightning_bd``.

    Differs from the paper in the optimizer, which is lightly's for small images: SGD with momentum 0.9 and weight decay
    5e-4, the learning rate falling along a cosine, instead of LARS.

    Args:
        backbone: Makes the network from numbers of classes and channels; its output has to be a linear layer's.
        backbone_arguments: Further arguments of ``backbone``, such as ``width: 16`` of the residual networks.
        images: Folder of unlabelled images that the attacker has besides, sub-folders included and hidden ones left
            out; resized (bilinear, antialiased), grey if the others are, held in memory.
        epochs: Number of epochs, at least 1; the paper's 100 to 1000.
        lr: Learning rate of the first epoch, positive.
        batch_size: Images per step, at most; at least 4. An epoch's are split evenly.
        temperature: Of the softmax, positive; the paper's 0.5 on CIFAR-10.
        seed: Of initial weights, order and views.
        device: Where to train and compute.
        precision: Of the convolutions while training; ``"bfloat16"`` is about twice as fast where the processor knows
            it. Features are computed in float32.

    Raises:
        ValueError: If an argument is out of its range; when used, if there are fewer than two different images, one
            cannot be read, the network does not end in a linear layer, or the loss does not stay finite.
        FileNotFoundError: When used, if there is no folder ``images``.
        MisconfigurationException: When trained, if lightly is not installed.

    Example:
        >>> from lightning_bd.backbones import small_cnn
        >>> encoder = SelfSupervisedEncoder(small_cnn, {"width": 8}, epochs=200, batch_size=128)
        >>> encoder.epochs
        200
    """

    def __init__(
        self,
        backbone: Callable[..., nn.Module] = resnet18,
        backbone_arguments: dict[str, int | float | str | bool] | None = None,
        images: str | Path | None = None,
        epochs: int = 100,
        lr: float = 0.06,
        batch_size: int = 256,
        temperature: float = 0.5,
        seed: int = 0,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 4)):
            if value < least:
                raise ValueError(f"Expected argument `{name}` to be an integer of at least {least}, but got {value}.")
        for name, number in (("lr", lr), ("temperature", temperature)):
            if not 0 < number < math.inf:
                raise ValueError(f"Expected argument `{name}` to be a positive float, but got {number}.")
        if precision not in get_args(Precision):
            raise ValueError(f"Expected argument `precision` to be one of {get_args(Precision)}, but got {precision}.")
        self.backbone = backbone
        self.backbone_arguments = dict(backbone_arguments or {})
        self.images = None if images is None else Path(images)
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.temperature = temperature
        self.seed = seed
        self.precision: Precision = precision
        # Not under the argument's name: where it is trained does not make it another network.
        self._device = torch.device(device)
        self._network: tuple[str, nn.Module] | None = None

    def features(self, images: Tensor) -> Tensor:
        """Train on the images, unless that was done before, and map them.

        Args:
            images: ``(N, C, H, W)``, uint8 or floating-point in [0, 1].

        Returns:
            ``(N, D)`` float32 on the CPU.
        """
        key = self._fingerprint(images)
        if self._network is None or self._network[0] != key:
            self._network = (key, self._trained(images, _weights_file(key)))
        return super().features(images)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return ``(B, D)`` of images ``(B, C, H, W)`` in [0, 1] by the network that :meth:`features` trained last."""
        if self._network is None:
            raise ValueError(
                "The encoder has not been trained: call its `features` with all images that it is to be trained on."
            )
        found: Tensor = self._network[1](images.to(self._device))
        return found

    def identity(self) -> Description:
        """Describe the arguments, and the other images by their content instead of by where they lie."""
        described = describe(self)
        assert isinstance(described, dict)
        digests = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in self._files())
        content = hashlib.sha256("".join(digests).encode()).hexdigest() if self.images is not None else None
        return {**{name: value for name, value in described.items() if name != "images"}, "images_sha256": content}

    def _files(self) -> list[Path]:
        if self.images is None:
            return []
        if not self.images.is_dir():
            raise FileNotFoundError(
                f"There is no folder {self.images.absolute()} of unlabelled images. Nothing is downloaded: put images "
                "there, or set the encoder's `images` to where they lie, or leave it out."
            )
        files = sorted(
            file
            for file in self.images.rglob("*")
            if file.suffix.lower() in IMG_EXTENSIONS
            and not any(part.startswith(".") for part in file.relative_to(self.images).parts)
        )
        if not files:
            raise ValueError(
                f"Expected argument `images` to be a folder of images ({', '.join(IMG_EXTENSIONS)}), but {self.images} "
                "holds none."
            )
        return files

    def _fingerprint(self, images: Tensor) -> str:
        """Return the SHA-256 hex digest of all that the weights depend on."""
        facts = {"version": _VERSION, "encoder": self.identity(), "shape": list(images.shape[1:])}
        return content_key(facts, sorted(set(image_digests(images))))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _trained(self, images: Tensor, path: Path) -> nn.Module:
        """Return the network in evaluation mode, with weights from the file if it is there."""
        pool = _different(self._with_others(to_bytes(images).cpu()))
        if len(pool) < 2:
            raise ValueError(f"Expected at least 2 different images to train an encoder on, but got {len(pool)}.")
        network = nn.Sequential(_normalize(pool), self._headless(pool)).to(self._device)
        if read_tensors(path, "The encoder", network.load_state_dict) is None:
            self._fit(network, pool)
            keep_tensors(path, network.state_dict(), "The encoder")
        return network.eval()

    def _with_others(self, images: Tensor) -> Tensor:
        files = self._files()
        if not files:
            return images
        if images.shape[1] not in (1, 3):
            raise ValueError(
                f"Expected images of 1 or 3 channels beside a folder of others, but got {images.shape[1]}."
            )
        channels, height, width = images.shape[1:]
        return torch.cat([images, read_images(files, (channels, height, width), title="other data")])

    def _headless(self, pool: Tensor) -> nn.Module:
        """Return a new network whose output are the features."""
        with keyed_global_state(self.seed, "self-supervised weights"):
            network = self.backbone(2, pool.shape[1], **self.backbone_arguments)
        sample = pool[:2].float() / 255
        head = _last_linear(network, sample)
        network.set_submodule(head, nn.Identity())
        return network

    def _fit(self, network: nn.Module, pool: Tensor) -> None:
        projection_head, nt_xent = _lightly()
        # Layers such as dropout draw from the global stream.
        with keyed_global_state(self.seed, "self-supervised training", device=self._device):
            with torch.no_grad():
                width = network.eval()(pool[:1].to(self._device).float() / 255).shape[1]
            model = nn.Sequential(network, projection_head(width, width, 128)).to(self._device)
            # Twice as fast on a processor.
            model.train().to(memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
            loss = nt_xent(self.temperature)
            for epoch in tqdm(range(self.epochs), "encoder", leave=False, delay=3):
                self._epoch(model, pool, loss, optimizer, epoch)
                schedule.step()
        network.to(memory_format=torch.contiguous_format)

    def _epoch(
        self, model: nn.Module, pool: Tensor, loss: nn.Module, optimizer: torch.optim.Optimizer, epoch: int
    ) -> None:
        generator = keyed_generator(self.seed, "self-supervised epoch", epoch)
        order = torch.randperm(len(pool), generator=generator)
        total = torch.zeros((), device=self._device)
        for rows in torch.tensor_split(order, -(-len(pool) // self.batch_size)):
            batch = pool[rows].to(self._device).float() / 255
            views = torch.cat([augmented_view(batch, generator) for _ in range(2)])
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                projected = model(views.contiguous(memory_format=torch.channels_last))
            value = loss(*projected.float().chunk(2))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total += value.detach()
        if not bool(total.isfinite()):
            raise ValueError(f"The encoder's loss is not finite after epoch {epoch}. Lower its `lr` ({self.lr}).")


def _lightly() -> tuple[Callable[[int, int, int], nn.Module], Callable[[float], nn.Module]]:
    """Return the classes of the projection head and of the loss."""
    try:
        # Imported here: it is an extra, and takes seconds.
        from lightly.loss.ntx_ent_loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead
    except ImportError as error:
        raise MisconfigurationException(
            "Install lightly to train a `SelfSupervisedEncoder`, `pip install lightning-bd[ssl]`, or use another "
            f"encoder: {error}"
        ) from error
    return SimCLRProjectionHead, NTXentLoss


def _last_linear(network: nn.Module, images: Tensor) -> str:
    """Return the name of the linear layer that makes the network's output."""
    # Refuses a network without one.
    penultimate(network, images)
    executed: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: executed.append(name))
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with mode(network, training=False), torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return executed[-1]


def _different(images: Tensor) -> Tensor:
    """Return each image once, in an order of the pixels' own."""
    first = {digest: row for row, digest in enumerate(image_digests(images))}
    return images[torch.tensor([first[digest] for digest in sorted(first)])]


def _normalize(images: Tensor) -> nn.Module:
    sums = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in torch.split(images, 1024):
        wide = part.double() / 255
        sums += torch.stack([wide.sum(dim=(0, 2, 3)), wide.square().sum(dim=(0, 2, 3))])
    mean, square = sums / (len(images) * images[0, 0].numel())
    # A channel that is the same everywhere has no deviation to divide by.
    std = (square - mean.square()).clamp_min(0).sqrt().clamp_min(1e-3)
    normalize: nn.Module = Normalize(mean.tolist(), std.tolist())
    return normalize


def _weights_file(key: str) -> Path:
    return cache_folder("encoders") / f"SelfSupervisedEncoder-{key}.safetensors"
