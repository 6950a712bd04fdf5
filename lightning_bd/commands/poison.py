"""The commands that poison without training, as methods of a Trainer."""

from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_info
from rich.table import Table

from lightning_bd.commands.checkpoints import own_data, take_over
from lightning_bd.commands.poisoned_copy import write_poisoned_copy
from lightning_bd.commands.preview import draw_preview
from lightning_bd.datamodules import ImageDataModule, PhaseData
from lightning_bd.phase_run import is_first_process
from lightning_bd.phase_setup import data_of
from lightning_bd.phases import MultiPhaseTrainer
from lightning_bd.quiet import threads
from lightning_bd.results_table import wide_console
from lightning_bd.triggers import Trigger

__all__ = ("PoisonTrainer",)


class PoisonTrainer(MultiPhaseTrainer):
    """Writes a poisoned data set to disk, and shows what a trigger does; neither trains."""

    def poison(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        output: str | Path,
        phase: str | None = None,
        ckpt_path: str | Path | None = None,
    ) -> None:
        """Write a poisoned copy of the training set, and the clean test set, as folders of PNG files.

        `lightning-bd poison --config C --output DIR`. Written are the images of the poisoned phase's split, as its
        static poison leaves them: triggered, rounded to 8 bits, with the attacker's labels, not augmented. A dynamic
        poison is made static. `manifest.json` beside them names the trigger, the poisoned images and the order;
        `ImageFolderDataModule` reads the folder in that order.

        Args:
            model: Used with a checkpoint only; a config has one.
            datamodule: The data and its poison.
            output: The folder to write; missing or empty.
            phase: The phase whose images are written; the poisoned one if not given, and without phases the whole
                training set.
            ckpt_path: A checkpoint whose trigger is used; needed for one that is trained with a model.
        """
        self._refuse_fresh()
        data = self._attacked_data(model, datamodule, ckpt_path)
        if not is_first_process():
            return
        written = self._poisoned_phase(data, phase)
        if written.poison == "dynamic":
            rank_zero_info("The poison is dynamic, made anew for each batch; what is written is poisoned once.")
        chosen, folder = PhaseData(written.name, written.splits, "static"), Path(output)
        with threads(self.num_threads):
            copy = write_poisoned_copy(self, data, chosen, folder)
        covers = f" and {copy.covers} covers" if copy.covers else ""
        wide_console().print(
            f"{copy.images} training images, {copy.poisoned} of them poisoned{covers}, and {copy.test_images} clean"
            f" test images: {folder}\n"
            "Train on them with `data.class_path: lightning_bd.datamodules.ImageFolderDataModule`, its `root:"
            f" {folder}` and `poisoned: false`; `data.init_args.poison` still measures the attack.",
            soft_wrap=True, markup=False, highlight=False,
        )  # fmt: skip

    def preview(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        images: int = 6,
        max_images: int = 500,
        output: str | Path | None = None,
        ckpt_path: str | Path | None = None,
    ) -> None:
        """Draw clean images, the triggered ones and the difference, and measure how visible the trigger is.

        `lightning-bd preview --config C`, or of a trained model `lightning-bd preview --ckpt_path X`. Shown are test
        images that the attack aims at, with the trigger of the attack: rounded to 8 bits if the poison is static. PSNR,
        SSIM and L-infinity are means over images; those that the trigger leaves as they are have no finite PSNR, and
        count only in the others. The measures are also written as a table beside the figure.

        Args:
            model: Used with a checkpoint only; a config has one.
            datamodule: The data and its poison.
            images: Number of images to draw.
            max_images: At most so many test images to measure.
            output: The PNG file; `preview.png` in `trainer.default_root_dir` if not given.
            ckpt_path: A checkpoint whose trigger is shown; what is trained with a model is not to be seen before.
        """
        self._refuse_fresh()
        for name, value in (("images", images), ("max_images", max_images)):
            if value < 1:
                raise ValueError(f"Expected argument `{name}` to be a positive integer, but got {value}.")
        data = self._attacked_data(model, datamodule, ckpt_path)
        if not is_first_process():
            return
        path = Path(output) if output is not None else Path(self.default_root_dir) / "preview.png"
        with threads(self.num_threads):
            name, measured = draw_preview(data, path, images, max_images)
            measured.write(name, path.with_suffix(".csv"))
        table = Table("trigger", "test images", "unchanged", *measured.means)
        table.add_row(name, str(measured.images), str(measured.unchanged), *measured.cells())
        console = wide_console()
        console.print(table)
        console.print(f"Figure: {path}", soft_wrap=True, markup=False, highlight=False)

    def _attacked_data(
        self, model: LightningModule, datamodule: LightningDataModule, ckpt_path: str | Path | None
    ) -> ImageDataModule:
        """Return the data with its trigger: that of the checkpoint, if one is given."""
        data = own_data(datamodule, self.phases)
        if ckpt_path is None:
            if data.poison is None:
                raise MisconfigurationException(
                    "The config has no `data.init_args.poison`: say how images are poisoned."
                )
            trained = [each for each in data.poison.trigger.modules() if isinstance(each, Trigger) and each.is_trained]
            if trained:
                raise MisconfigurationException(
                    f"{type(trained[0]).__name__} is trained together with a model, and is nothing before: give a"
                    " checkpoint of it, `--ckpt_path X`."
                )
        data.prepare_data()
        if ckpt_path is not None:
            path = Path(ckpt_path)
            if take_over(path, model, data, override_trigger=self.override_trigger) is None:
                raise MisconfigurationException(f"{path} has no manifest, so its trigger is not known.")
        return data

    def _poisoned_phase(self, data: ImageDataModule, name: str | None) -> PhaseData:
        """Return the phase whose images are to be written."""
        poisoned = [each for each, phase in self.phases.items() if phase.poisoned]
        if name is None and len(poisoned) > 1:
            raise MisconfigurationException(
                f"Several phases are poisoned: {', '.join(poisoned)}. Choose one by `--phase NAME`."
            )
        if name is not None and name not in poisoned:
            offered = f"those are: {', '.join(poisoned)}" if poisoned else "the config has none"
            raise MisconfigurationException(f"`--phase {name}` names no poisoned phase; {offered}.")
        if not poisoned:
            return data.phase
        return data_of(self.phases[name or poisoned[0]], data)

    def _refuse_fresh(self) -> None:
        if self.fresh:
            raise MisconfigurationException(
                "`--fresh` is for `fit` and `defend`, which go on in their folders; this command writes its own anew."
            )
