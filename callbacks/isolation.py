"""Run a training batch a second time as if it had not been run."""

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

__all__ = ("IsolatedPass", "RandomState", "copy_tensors", "overwrite")

_Metric = Metric | MetricCollection


class RandomState:
    """The state of the random streams of torch (CPU and ``device``), NumPy and Python at one moment.

    Args:
        device: The device whose stream is kept beside that of the CPU. No stream is touched, and no device waited for.

    Example:
        >>> state = RandomState(torch.device("cpu"))
        >>> first = torch.rand(2)
        >>> state.restore()
        >>> torch.equal(first, torch.rand(2))
        True
    """

    def __init__(self, device: torch.device) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._torch = torch.get_rng_state()
        self._device = device
        self._accelerator = None if device.type == "cpu" else torch.get_device_module(device)
        # There is one MPS device only, and its functions take none.
        self._place = () if device.type == "mps" else (device,)
        self._on_device = None if self._accelerator is None else self._accelerator.get_rng_state(*self._place)

    def seed(self, seed: int) -> None:
        """Start the streams of torch, on the CPU and on the device, anew from a seed; :meth:`restore` takes it back."""
        torch.default_generator.manual_seed(seed)
        if self._accelerator is not None:
            state = torch.Generator(self._device).manual_seed(seed).get_state()
            self._accelerator.set_rng_state(state, *self._place)

    def restore(self) -> None:
        """Wind all streams back to the moment when this object was made."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._accelerator is not None:
            self._accelerator.set_rng_state(self._on_device, *self._place)


class IsolatedPass:
    """Context in which ``training_step`` may run once more without a trace.

    When the block ends, also by an exception, these are as before: all buffers (BatchNorm statistics and counters,
    queues, spectral norm vectors), the state of all torchmetrics in the module, and the random streams. Inside it
    ``log`` and ``log_dict``, of the module and of the callbacks, do nothing and the loggers are dummies. Gradients
    are the caller's business; what ``training_step`` keeps elsewhere (Python attributes, weights that it writes
    itself) is not put back. One object serves a whole fit and may be entered any number of times.

    Args:
        trainer: The trainer that is fitting ``pl_module``.
        pl_module: The module whose ``training_step`` is to run.

    Example:
        >>> module = LightningModule()
        >>> module.register_buffer("queue", torch.zeros(2))
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> with IsolatedPass(trainer, module):
        ...     _ = module.queue.add_(torch.rand(2))
        >>> module.queue
        tensor([0., 0.])
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trainer = trainer
        self._pl_module = pl_module
        self._stand_ins: dict[int, tuple[_Metric, _Metric]] = {}
        self._exits = ExitStack()

    def __enter__(self) -> None:
        """Take down what the block may change."""
        modules = list(self._pl_module.modules())
        with ExitStack() as exits:
            exits.callback(RandomState(self._trainer.strategy.root_device).restore)
            exits.enter_context(_restored_buffers(modules))
            exits.enter_context(self._exchanged_metrics(modules))
            exits.enter_context(_muted_loggers(self._trainer, self._pl_module))
            self._exits = exits.pop_all()

    def __exit__(self, *exception: object) -> None:
        """Put everything back."""
        self._exits.close()

    @contextmanager
    def _exchanged_metrics(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Put empty stand-ins in the place of the metrics, for copying a state may be dear: that of a curve is long."""
        places = [
            (parent._modules, name, child)
            for parent in modules
            if not isinstance(parent, _Metric)
            for name, child in parent._modules.items()
            if isinstance(child, _Metric)
        ]
        stand_ins = [self._stand_in(metric) for _, _, metric in places]
        try:
            for (children, name, _), stand_in in zip(places, stand_ins, strict=True):
                children[name] = stand_in
            yield
        finally:
            for (children, name, metric), stand_in in zip(places, stand_ins, strict=True):
                children[name] = metric
                stand_in.reset()

    def _stand_in(self, metric: _Metric) -> _Metric:
        if id(metric) not in self._stand_ins:
            # A cached result may hang on the graph of the first pass, which cannot be copied.
            caches = [vars(part).get(name) for part in metric.modules() for name in ("_forward_cache", "_computed")]
            stand_in = deepcopy(metric, {id(cache): None for cache in caches})
            stand_in.reset()
            # The metric is kept too: its id is its key, and must not be given to another object.
            self._stand_ins[id(metric)] = (metric, stand_in)
        return self._stand_ins[id(metric)][1]


def copy_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy a list of tensors in few kernels, detached, with their strides.

    Args:
        tensors: Tensors of any shapes and dtypes.

    Example:
        >>> copy_tensors([torch.ones(2), torch.tensor(3)])
        [tensor([1., 1.]), tensor(3)]
    """
    copies = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
    overwrite(copies, tensors)
    return copies


@torch.no_grad()
def overwrite(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in few kernels.

    Args:
        targets: Tensors to write, in place.
        sources: Tensors of the same shapes, in the same order.

    Example:
        >>> target = torch.zeros(2)
        >>> overwrite([target], [torch.ones(2)])
        >>> target
        tensor([1., 1.])
    """
    # A list of one dtype is one kernel; a mixed one would be as many as there are tensors.
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        group = groups.setdefault(target.dtype, ([], []))
        group[0].append(target)
        group[1].append(source)
    for group_targets, group_sources in groups.values():
        torch._foreach_copy_(group_targets, group_sources)


@contextmanager
def _restored_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    owners = [module._buffers for module in modules if module._buffers]
    # The tensors are kept as well as their values: a buffer may be written in place or replaced by assignment.
    entries = [dict(owner) for owner in owners]
    buffers = [buffer for entry in entries for buffer in entry.values() if buffer is not None and _is_writable(buffer)]
    values = copy_tensors(buffers)
    try:
        yield
    finally:
        for owner, entry in zip(owners, entries, strict=True):
            owner.update(entry)
        overwrite(buffers, values)


def _is_writable(tensor: Tensor) -> bool:
    """Whether no two elements share memory, as those of an expanded tensor do: PyTorch refuses to write these."""
    return tensor.is_contiguous() or all(
        stride > 0 or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


@contextmanager
def _muted_loggers(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    # Lightning hands the module's `log` to every callback, so that each of them holds one.
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    owners = [vars(owner) for owner in (pl_module, *callbacks)]
    names = {"log", "log_dict"}
    before = [{name: owner[name] for name in names & owner.keys()} for owner in owners]
    loggers = trainer.loggers
    try:
        trainer.loggers = [DummyLogger() for _ in loggers]
        for owner in owners:
            owner["log"] = owner["log_dict"] = _discard
        yield
    finally:
        trainer.loggers = loggers
        for owner, attributes in zip(owners, before, strict=True):
            for name in names:
                owner.pop(name, None)
            owner.update(attributes)


def _discard(*args: object, **kwargs: object) -> None:
    """Stand in for ``log``; one function for all passes, for a compiled ``training_step`` is guarded by identity."""
