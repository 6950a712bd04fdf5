"""What every trigger promises, and what the base class refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonargparse import auto_cli
from torch import Tensor

from lightning_bd import triggers
from lightning_bd.triggers import (
    SIG,
    AdaptiveBlend,
    BadNets,
    Blended,
    BppAttack,
    LowFrequency,
    SequentialTrigger,
    TensorSpec,
    TrainTestTrigger,
    Trigger,
    WaNet,
)

SHAPE = (3, 16, 12)

FACTORIES: dict[str, Callable[[], Trigger]] = {
    "badnets": BadNets,
    "badnets-placed": lambda: BadNets(size=(2, 4), position=(5, 1), color=(1.0, 0.5, 0.0), seed=3),
    "badnets-margin": lambda: BadNets(position="top_left", pattern="checkerboard", margin=2),
    "adaptive-blend": lambda: AdaptiveBlend(ratio=0.4, pieces=9, seed=2),
    "blended": Blended,
    "blended-noise": lambda: Blended(ratio=0.7, pattern="noise", seed=4),
    "sig": lambda: SIG(amplitude=0.4, frequency=2.5),
    "wanet": lambda: WaNet(grid_size=3, strength=2.0, seed=5, grid_rescale=0.98),
    "low-frequency": lambda: LowFrequency(strength=0.3, cutoff=5, seed=6),
    "sequential": lambda: SequentialTrigger([SIG(amplitude=0.3), BadNets(size=2)]),
    "train-test": lambda: TrainTestTrigger(
        SequentialTrigger([LowFrequency()]), SequentialTrigger([LowFrequency(strength=0.5), BadNets(size=2)])
    ),
}
WITHOUT_TENSORS: dict[str, Callable[[], Trigger]] = {
    "bpp": BppAttack,
    "bpp-dithering": lambda: BppAttack(bits=2, dithering=True),
}


@pytest.fixture(params=[*FACTORIES.values(), *WITHOUT_TENSORS.values()], ids=[*FACTORIES, *WITHOUT_TENSORS])
def trigger(request: pytest.FixtureRequest) -> Trigger:
    made = request.param()
    assert isinstance(made, Trigger)
    return made


@pytest.fixture(params=list(FACTORIES.values()), ids=list(FACTORIES))
def trigger_with_tensors(request: pytest.FixtureRequest) -> Trigger:
    made = request.param()
    assert isinstance(made, Trigger)
    return made


@pytest.fixture
def images() -> Tensor:
    # The two extremes must stay in range too.
    batch = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    batch[0], batch[1] = 0.0, 1.0
    return batch


def test_forward_makes_new_images_in_range_and_leaves_its_input(trigger: Trigger, images: Tensor) -> None:
    before = images.clone()
    triggered = trigger(images)
    assert triggered.shape == images.shape
    assert triggered.dtype == images.dtype
    assert triggered.data_ptr() != images.data_ptr()
    assert torch.equal(images, before)
    assert not torch.equal(triggered, images)
    assert triggered.min() >= 0
    assert triggered.max() <= 1


def test_same_pixels_alone_in_a_batch_and_again(trigger: Trigger, images: Tensor) -> None:
    triggered = trigger(images)
    assert torch.equal(trigger(images), triggered)
    assert torch.equal(torch.cat([trigger(image[None]) for image in images]), triggered)


def test_global_random_state_is_neither_read_nor_moved(trigger: Trigger, images: Tensor) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = trigger(images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = _rebuilt(trigger)
    again.build(SHAPE)
    assert torch.equal(again(images), first)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)]
)
def test_dtypes(trigger: Trigger, images: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    rounded = images.to(dtype)
    triggered = trigger(rounded)
    assert triggered.dtype == dtype
    assert triggered.min() >= 0
    assert triggered.max() <= 1
    assert (triggered.float() - trigger(rounded.float())).abs().max() < tolerance


def test_channels_last_and_strided_inputs(trigger: Trigger, images: Tensor) -> None:
    triggered = trigger(images)
    assert torch.equal(trigger(images.to(memory_format=torch.channels_last)), triggered)
    one_image_repeated = images[2:3].expand(4, -1, -1, -1)
    assert torch.equal(trigger(one_image_repeated), triggered[2:3].expand(4, -1, -1, -1))


def test_empty_batch(trigger: Trigger) -> None:
    empty = torch.rand(0, *SHAPE)
    assert trigger(empty).shape == (0, *SHAPE)
    assert trigger.cover(empty, torch.Generator()).shape == (0, *SHAPE)


def test_build_is_idempotent_and_bound_to_one_shape(trigger: Trigger) -> None:
    unbuilt = trigger.image_shape
    assert unbuilt is None
    assert not trigger.state_dict()
    trigger.build(SHAPE)
    tensors = dict(trigger.named_buffers())
    trigger.build(SHAPE)
    assert trigger.image_shape == SHAPE
    assert all(tensor is tensors[name] for name, tensor in trigger.named_buffers())
    with pytest.raises(ValueError, match=r"be \(3, 16, 12\), which .* but got \(3, 12, 16\)"):
        trigger.build((3, 12, 16))


def test_hyperparameters_survive_json_and_rebuild_the_trigger(trigger: Trigger, images: Tensor) -> None:
    rebuilt = _from_plain(type(trigger), json.loads(json.dumps(trigger.hyperparameters)))
    assert rebuilt.hyperparameters == trigger.hyperparameters
    assert torch.equal(rebuilt(images), trigger(images))


def test_state_dict_and_restore_give_the_same_bits(trigger_with_tensors: Trigger, images: Tensor) -> None:
    expected = trigger_with_tensors(images)
    # Values that cannot be computed again, to see that the saved ones are used.
    saved = {name: tensor * 0.5 for name, tensor in trigger_with_tensors.state_dict().items()}
    loaded, restored = _rebuilt(trigger_with_tensors), _rebuilt(trigger_with_tensors)
    loaded.build(SHAPE)
    loaded.load_state_dict(saved)
    restored.restore(SHAPE, saved)
    assert restored.image_shape == SHAPE
    assert torch.equal(loaded(images), restored(images))
    assert not torch.equal(restored(images), expected)
    restored.restore(SHAPE, trigger_with_tensors.state_dict())
    assert torch.equal(restored(images), expected)


def test_restore_copies_the_tensors(trigger_with_tensors: Trigger, images: Tensor) -> None:
    trigger_with_tensors.build(SHAPE)
    saved = {name: tensor.clone() for name, tensor in trigger_with_tensors.state_dict().items()}
    restored = _rebuilt(trigger_with_tensors)
    restored.restore(SHAPE, saved)
    for tensor in saved.values():
        tensor.fill_(float("nan"))
    assert torch.equal(restored(images), trigger_with_tensors(images))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda saved: {}, r"to be named \['.+'\], but got \[\]"),
        (lambda saved: {**saved, "extra": torch.zeros(1)}, r"to be named .* but got .*'extra'"),
        (lambda saved: {n: t[:-1] for n, t in saved.items()}, r"to have shape \(.*\), but got \("),
        (lambda saved: {n: t.double() for n, t in saved.items()}, r"float32, but got torch\.float64"),
        (lambda saved: {n: t.to_sparse() for n, t in saved.items()}, r"dense tensor .* but got .*sparse"),
        (lambda saved: {n: t.tolist() for n, t in saved.items()}, r"dense tensor .* but got list"),
        (lambda saved: {n: t.clone().fill_(float("nan")) for n, t in saved.items()}, r"finite values in .* from nan"),
        (lambda saved: {n: t.clone().fill_(float("inf")) for n, t in saved.items()}, r"finite values in .* to inf"),
        (lambda saved: {n: t.flatten()[0].clone().expand(t.shape) for n, t in saved.items()}, r"repeats some"),
        (lambda saved: {n: t + 5 for n, t in saved.items()}, r"finite values in \[-?\d\.0, 1\.0\], but got"),
    ],
    ids=["missing", "extra", "shape", "dtype", "sparse", "list", "nan", "inf", "view", "range"],
)
def test_restore_refuses_damaged_tensors_and_stays_unbuilt(
    trigger_with_tensors: Trigger, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    trigger_with_tensors.build(SHAPE)
    restored = _rebuilt(trigger_with_tensors)
    with pytest.raises(ValueError, match=message):
        restored.restore(SHAPE, damage(trigger_with_tensors.state_dict()))
    assert restored.image_shape is None
    assert not restored.state_dict()


def test_restore_refuses_another_shape_once_built(trigger: Trigger) -> None:
    trigger.build(SHAPE)
    with pytest.raises(ValueError, match=r"be \(3, 16, 12\), which .* but got \(3, 8, 8\)"):
        trigger.restore((3, 8, 8), trigger.state_dict())


def test_built_while_validating_is_usable_under_autograd(trigger_with_tensors: Trigger, images: Tensor) -> None:
    with torch.inference_mode():
        expected = trigger_with_tensors(images.clone())
        saved = {name: tensor.clone() for name, tensor in trigger_with_tensors.state_dict().items()}
    restored = _rebuilt(trigger_with_tensors)
    with torch.inference_mode():
        restored.restore(SHAPE, saved)
    for built in (trigger_with_tensors, restored):
        assert not any(tensor.is_inference() for tensor in built.buffers())
        leaf = images.clone().requires_grad_()
        triggered = built(leaf)
        triggered.sum().backward()
        assert leaf.grad is not None
        assert torch.equal(triggered, expected)


def test_cover_without_a_noise_mode_is_the_trigger(images: Tensor) -> None:
    for made in (BadNets(), Blended(), SIG(), LowFrequency()):
        assert torch.equal(made.cover(images, torch.Generator()), made(images))


def test_the_attack_is_the_trigger(images: Tensor) -> None:
    for made in (BadNets(), Blended(), SIG(), WaNet(), LowFrequency(), BppAttack(), SequentialTrigger([SIG()])):
        assert torch.equal(made.attack(images), made(images))


@pytest.mark.parametrize("image_shape", [(3, 32), (3, 0, 32), (3, 32.0, 32), (-1, 8, 8)])
def test_build_refuses_what_is_no_image_shape(trigger: Trigger, image_shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"`image_shape` to be three positive integers \(C, H, W\), but got \("):
        trigger.build(image_shape)


@pytest.mark.parametrize("shape", [(2, 3, 12, 16), (2, 1, 16, 12)])
def test_forward_and_cover_refuse_another_image_shape(trigger: Trigger, shape: tuple[int, ...]) -> None:
    trigger.build(SHAPE)
    for change in (trigger, trigger.cover, trigger.attack):
        with pytest.raises(ValueError, match=rf"of shape \(3, 16, 12\), .* but got \({shape[1]}, {shape[2]}, "):
            change(torch.rand(shape))


def test_forward_refuses_what_is_no_batch_of_float_images(trigger: Trigger) -> None:
    with pytest.raises(ValueError, match=r"of shape \(B, C, H, W\), but got torch.float32 of shape \(3, 16, 12\)"):
        trigger(torch.rand(SHAPE))
    with pytest.raises(ValueError, match=r"floating-point tensor .* but got torch.uint8 of shape \(2, 3, 16, 12\)"):
        trigger(torch.zeros(2, *SHAPE, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_default_dtype_and_device_do_not_reach_the_tensors(
    trigger: Trigger, images: Tensor, dtype: torch.dtype
) -> None:
    expected = trigger(images)
    rebuilt = _rebuilt(trigger)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            rebuilt.build(SHAPE)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(rebuilt(images), expected)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"class_path": "BadNets", "init_args": {"size": [2, 3], "position": [1, 2], "color": [1, 0, 0.5]}},
            BadNets(size=(2, 3), position=(1, 2), color=(1.0, 0.0, 0.5)),
        ),
        (
            {"class_path": "BadNets", "init_args": {"size": 4, "position": "center", "pattern": "white"}},
            BadNets(size=4, position="center", pattern="white"),
        ),
        ({"class_path": "Blended", "init_args": {"image": "a/b.png"}}, Blended(image=Path("a/b.png"))),
        ({"class_path": "SIG", "init_args": {"frequency": 3}}, SIG(frequency=3.0)),
        ({"class_path": "WaNet", "init_args": {"strength": 0.75}}, WaNet(strength=0.75)),
        ({"class_path": "LowFrequency", "init_args": {"strength": 0.5, "cutoff": 2}}, LowFrequency(0.5, 2)),
        ({"class_path": "BppAttack", "init_args": {"bits": 5, "dithering": True}}, BppAttack(5, dithering=True)),
        (
            {
                "class_path": "SequentialTrigger",
                "init_args": {
                    "triggers": [
                        {"class_path": "lightning_bd.triggers.SIG", "init_args": {"amplitude": 0.25}},
                        {"class_path": "lightning_bd.triggers.BadNets", "init_args": {"size": [2, 3]}},
                    ]
                },
            },
            SequentialTrigger([SIG(amplitude=0.25), BadNets(size=(2, 3))]),
        ),
        (
            {
                "class_path": "TrainTestTrigger",
                "init_args": {
                    "training_trigger": {"class_path": "lightning_bd.triggers.Blended", "init_args": {"ratio": 0.1}},
                    "test_trigger": {"class_path": "lightning_bd.triggers.Blended", "init_args": {"ratio": 0.3}},
                },
            },
            TrainTestTrigger(Blended(ratio=0.1), Blended(ratio=0.3)),
        ),
    ],
)
def test_configs_are_parsed(config: dict[str, object], expected: Trigger) -> None:
    def chosen(trigger: Trigger) -> Trigger:
        return trigger

    full = {**config, "class_path": f"lightning_bd.triggers.{config['class_path']}"}
    made = auto_cli(chosen, args=["--trigger", json.dumps(full)], as_positional=False)
    assert type(made) is type(expected)
    assert made.hyperparameters == expected.hyperparameters


def test_repr_shows_the_arguments() -> None:
    assert repr(SIG(amplitude=0.25)) == "SIG(amplitude=0.25, frequency=6.0)"


class Invert(Trigger):
    """A user's trigger: no tensors, one argument that may break the convention."""

    def __init__(self, level: object = 1, keep: bool = True) -> None:
        super().__init__()
        self.level = level
        if keep:
            self.keep = keep

    def _specs(self, image_shape: tuple[int, int, int]) -> dict[str, TensorSpec]:
        return {}

    def _compute(self, image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
        return {}

    def _transform(self, images: Tensor) -> Tensor:
        return 1 - images


def test_a_users_trigger_needs_three_methods(images: Tensor) -> None:
    trigger = Invert()
    assert torch.equal(trigger(images), 1 - images)
    assert trigger.hyperparameters == {"level": 1, "keep": True}


def test_hyperparameters_refuse_a_broken_convention() -> None:
    with pytest.raises(TypeError, match="Expected `Invert` to keep its argument `keep` as an attribute"):
        _ = Invert(keep=False).hyperparameters
    with pytest.raises(TypeError, match="attribute `level` to be made of plain builtins, but got a Tensor"):
        _ = Invert(level=[torch.zeros(1)]).hyperparameters


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_pixels_are_the_cpu_ones(trigger: Trigger, images: Tensor) -> None:
    on_device = trigger(images.cuda())
    assert on_device.is_cuda
    assert all(tensor.is_cuda for tensor in trigger.buffers())
    covers = trigger.cover(images.cuda(), torch.Generator().manual_seed(1)).cpu()
    rebuilt = _rebuilt(trigger)
    torch.testing.assert_close(on_device.cpu(), rebuilt(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(covers, rebuilt.cover(images, torch.Generator().manual_seed(1)), rtol=0, atol=1e-5)


def _rebuilt(trigger: Trigger) -> Trigger:
    return _from_plain(type(trigger), trigger.hyperparameters)


def _from_plain(kind: type[Trigger], arguments: dict[str, object]) -> Trigger:
    def part(value: object) -> object:
        if isinstance(value, list):
            return [part(item) for item in value]
        if isinstance(value, dict):
            return _from_plain(getattr(triggers, value["class"]), value["arguments"])
        return value

    return kind(**{name: part(value) for name, value in arguments.items()})
