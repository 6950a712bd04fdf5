"""Steps go on where the phase before ended."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_bd.phase_logger import PhaseTensorBoardLogger


def steps(logger: PhaseTensorBoardLogger, name: str) -> list[tuple[int, float]]:
    logger.finalize("success")
    return [(event.step, event.value) for event in EventAccumulator(logger.log_dir).Reload().Scalars(name)]


def test_steps_go_on(tmp_path: Path) -> None:
    first = PhaseTensorBoardLogger(tmp_path / "00_inject", 0)
    second = PhaseTensorBoardLogger(tmp_path / "01_consolidate", 120)
    for logger in (first, second):
        for step in (0, 50):
            logger.log_metrics({"train/loss": step / 100}, step)
    assert steps(first, "train/loss") == [(0, 0.0), (50, 0.5)]
    assert steps(second, "train/loss") == [(120, 0.0), (170, 0.5)]


def test_metrics_without_a_step_are_at_the_phases_first(tmp_path: Path) -> None:
    logger = PhaseTensorBoardLogger(tmp_path, 30)
    logger.log_metrics({"test/clean_accuracy": 1.0})
    assert steps(logger, "test/clean_accuracy") == [(30, 1.0)]


def test_the_test_after_a_phase_is_at_its_end(tmp_path: Path) -> None:
    logger = PhaseTensorBoardLogger(tmp_path, 30)
    logger.log_metrics({"loss": 1.0}, 5)
    logger.first_step = 40
    logger.log_metrics({"loss": 2.0}, 0)
    assert steps(logger, "loss") == [(35, 1.0), (40, 2.0)]


def test_each_phase_has_its_own_folder(tmp_path: Path) -> None:
    logger = PhaseTensorBoardLogger(tmp_path / "00_inject", 0)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert [path.parent for path in tmp_path.rglob("events.out.*")] == [tmp_path / "00_inject" / "tensorboard"]
