"""The Trainer of the command line: Lightning's commands, the phases, and those of this package."""

import os
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from rich.table import Table

from lightning_bd.checkpointing import check_weights, read_checkpoint
from lightning_bd.commands.checkpoints import named_after, own_data, take_over
from lightning_bd.commands.defend import (
    UNDEFENDED,
    DefenseFailedError,
    load_defenses,
    plan_phases,
)
from lightning_bd.commands.detection import DetectionTrainer
from lightning_bd.commands.interpolate import interpolate
from lightning_bd.commands.landscape import landscape
from lightning_bd.commands.poison import PoisonTrainer
from lightning_bd.commands.sharpness import sharpness
from lightning_bd.functional.digest import weights_sha256
from lightning_bd.phase_measurement import copy_state
from lightning_bd.phase_run import PhaseRun, is_first_process
from lightning_bd.quiet import threads
from lightning_bd.reports import plot_stages
from lightning_bd.results_table import print_results, wide_console

__all__ = ("CommandTrainer",)


class CommandTrainer(DetectionTrainer, PoisonTrainer):
    """Runs phases, defenses and measurements: the Trainer of the command line, a method for each command."""

    def defend(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | Path,
        defenses: str | list[str] = "all",
        split: str = "defend",
        batch_size: int | None = None,
    ) -> None:
        """Run defenses on one checkpoint, each from the same weights, and compare them in one table.

        Each gets a defender's view of the split: clean images, cut into training and validation, and nothing else.
        Clean accuracy, attack success and robust accuracy are measured afterwards with the trigger of the checkpoint's
        manifest. Rows, purified checkpoints and pictures go to `defend/<checkpoint>` in `trainer.default_root_dir`;
        finished defenses are skipped. `trainer.max_epochs` caps the epochs of each.

        Args:
            model: The model.
            datamodule: The data.
            ckpt_path: The attacked model, such as a run's `NN_<phase>/final.ckpt`.
            defenses: Names of shipped defenses or YAML files with the options of a phase, joined by commas or spaces;
                `all` for every shipped one.
            split: The split of the training set that the defender has.
            batch_size: Images per batch of each defense; the data's if not given.
        """
        path, data = Path(ckpt_path), own_data(datamodule, self.phases)
        phases = plan_phases(load_defenses(defenses), split, batch_size)
        manifest = take_over(path, model, data, override_trigger=self.override_trigger)
        root = Path(self.default_root_dir) / "defend" / named_after(path)
        run = PhaseRun(
            phases,
            {name: phase.start_from or "init" for name, phase in phases.items()},
            model,
            data,
            arguments={**self._arguments, "default_root_dir": root},
            processes=self.num_devices * self.num_nodes,
            config=self.resolved_config,
            collects=True,
            origin={"weights_sha256": weights_sha256(copy_state(model))},
            checkpoint_interval=self.checkpoint_interval,
            manifest=manifest,
            # What the user says of the trigger by `--override-trigger` must not become the checkpoint's own word.
            save_manifest=self.save_manifest and manifest is not None,
            unknown="" if manifest else "attack unknown: the checkpoint has no manifest",
            fresh=self.fresh,
            barrier=self._barrier_of_outside_launch(),
        )
        failures: list[str] = []
        with threads(self.num_threads):
            run.open_folder()
            for name in phases:
                try:
                    run.run(name)
                except Exception as error:
                    # Other processes would wait for this one.
                    alone = self.num_devices * self.num_nodes == 1
                    if name == UNDEFENDED or not alone or os.environ.get("LIGHTNING_BD_TRACEBACK"):
                        raise
                    failures.append(f"`{name}`: {type(error).__name__}: {error}")
                    rank_zero_warn(f"The defense {failures[-1]}\nThe others go on.")
        if is_first_process():
            for stages in sorted(root.glob("*/stages.csv")):
                plot_stages(stages, stages.with_suffix(".png"), title=stages.parent.name[3:])
            if self.show_results:
                print_results(run.folder.results(), root, f"Test set, {path} after each defense")
        if failures:
            raise DefenseFailedError(
                "These defenses failed and have no row; the same command tries them again:\n  " + "\n  ".join(failures)
            )

    def interpolate(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        first: str | Path,
        second: str | Path,
        points: int = 21,
        max_images: int = 500,
        recalibrate: bool = False,
    ) -> None:
        """Measure loss and accuracy, clean and triggered, on the straight line between two checkpoints.

        `lightning-bd interpolate A.ckpt B.ckpt`. The table and the figure go to `interpolate/<A>--<B>` in
        `trainer.default_root_dir`. The trigger is that of the first checkpoint with a manifest.

        Args:
            model: The model, of the architecture of both.
            datamodule: The data; its test images are used.
            first: The checkpoint at position 0.
            second: The checkpoint at position 1.
            points: Positions, both ends included; at least 2.
            max_images: At most so many test images per set.
            recalibrate: Measure BatchNorm's running statistics anew at each position, on as many clean training
                images; else they are interpolated like the weights.
        """
        self._refuse_fresh()
        data, paths = own_data(datamodule, self.phases), (Path(first), Path(second))
        for path in paths:
            check_weights(model, read_checkpoint(path)["state_dict"], path)
        given, poisons, ends, manifests = data.poison, [], [], []
        for path in paths:
            data.replace_poison(given)
            manifests.append(take_over(path, model, data, override_trigger=self.override_trigger))
            poisons.append(data.poison)
            ends.append(copy_state(model))
        if manifests[0] is not None and manifests[1] is not None and not self.override_trigger:
            different = manifests[0].differences(manifests[1])
            if different:
                raise MisconfigurationException(
                    "The two checkpoints name different triggers:\n  " + "\n  ".join(different) + "\nMeasure with the "
                    "config's by `--override-trigger`."
                )
        data.replace_poison(next((poison for poison in poisons if poison is not None), None))
        names = (named_after(paths[0]), named_after(paths[1]))
        if names[0] == names[1] and paths[0] != paths[1]:
            names = (f"{_run_of(paths[0])}-{names[0]}", f"{_run_of(paths[1])}-{names[1]}")
        folder = Path(self.default_root_dir) / "interpolate" / "--".join(names)
        with threads(self.num_threads):
            interpolate(
                self, model, data, (ends[0], ends[1]), names, folder,
                points=points, max_images=max_images, recalibrate=recalibrate,
            )  # fmt: skip

    def landscape(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | Path,
        points: int = 21,
        reach: float = 1.0,
        max_images: int = 500,
        seed: int = 0,
    ) -> None:
        """Measure the loss, clean and triggered, on a random plane through a checkpoint's weights.

        `lightning-bd landscape CKPT`. The directions are filter-normalised (Li et al., 2018). The table and the figure
        go to `landscape/<checkpoint>` in `trainer.default_root_dir`.

        Args:
            model: The model.
            datamodule: The data; its test images are used.
            ckpt_path: The checkpoint.
            points: Points along each direction; odd, at least 3.
            reach: Largest step along each direction; 1 is as large as the weights.
            max_images: At most so many test images per set.
            seed: Seed of the directions.
        """
        self._refuse_fresh()
        path, data = Path(ckpt_path), own_data(datamodule, self.phases)
        take_over(path, model, data, override_trigger=self.override_trigger)
        folder = Path(self.default_root_dir) / "landscape" / named_after(path)
        with threads(self.num_threads):
            landscape(
                self, model, data, named_after(path), folder,
                points=points, reach=reach, max_images=max_images, seed=seed,
            )  # fmt: skip

    def sharpness(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | Path,
        rho: float = 0.05,
        steps: int = 5,
        iterations: int = 50,
        max_images: int = 500,
        seed: int = 0,
    ) -> None:
        """Measure how sharp the minimum is that a checkpoint lies in, for clean and for triggered images.

        `lightning-bd sharpness CKPT`: the top eigenvalue of the loss's Hessian by power iteration, and the largest loss
        found within `rho` of the weights. The table and the figure go to `sharpness/<checkpoint>` in
        `trainer.default_root_dir`.

        Args:
            model: The model.
            datamodule: The data; its test images are used.
            ckpt_path: The checkpoint.
            rho: Radius of the ball, L2 over all parameters; SAM's is 0.05.
            steps: Steps of projected ascent in the ball; 1 is SAM's.
            iterations: Most steps of the power iteration.
            max_images: At most so many test images per set.
            seed: Seed of the power iteration's start.
        """
        self._refuse_fresh()
        path, data = Path(ckpt_path), own_data(datamodule, self.phases)
        take_over(path, model, data, override_trigger=self.override_trigger)
        folder = Path(self.default_root_dir) / "sharpness" / named_after(path)
        with threads(self.num_threads):
            rows = sharpness(
                self, model, data, named_after(path), folder,
                rho=rho, steps=steps, iterations=iterations, max_images=max_images, seed=seed,
            )  # fmt: skip
        if is_first_process():
            table = Table(*rows[0], title=f"Sharpness of {path}")
            for row in rows:
                table.add_row(*row.values())
            wide_console().print(table)


def _run_of(checkpoint: Path) -> str:
    return checkpoint.absolute().parent.parent.name
