"""Trackers: where a training run is logged besides its CSV files. `TrainConfig.log` chooses them.

A tracker gets the configuration, the scalars of metrics.csv and validation.csv at the same steps, the sample sheets,
the table of each evaluation, and the file of the generator. `<run>/trackers.json` holds the id that each tracker gave
the run: a resumed training continues it, and `ixi-etl evaluate` adds to it.

A tracker that cannot start ends the training before its first step. One that fails later is left out from then on, with
a warning, because the CSV files hold all of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image

from ixi_etl.core.extras import require_extra
from ixi_etl.core.files import read_json, to_json, write_atomic
from ixi_etl.core.text import markdown_table
from ixi_etl.errors import TrainingError, redacted
from model.config import TrackerName, TrainConfig
from model.tracker import Rows, Status, Tracker, params_of

log = logging.getLogger(__name__)

IDS_FILE = "trackers.json"
KEYS = ("protocol", "mask", "method", "subjects")
"""The first columns of an evaluation's table."""


class TensorBoard(Tracker):
    """Event files in `<run>/tensorboard`. TensorBoard keeps no files, so `log_file` does nothing."""

    def __init__(self, run: Path, config: TrainConfig, start: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=None if start is None else start + 1)
        if start == 0:
            self.log_table(0, "config", [{"field": k, "value": v} for k, v in params_of(config).items()])

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        for name, path in images.items():
            self.board.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def log_table(self, step: int, name: str, rows: Rows) -> None:
        self.board.add_text(name, markdown_table(rows), step)  # on its page under "text"

    def log_file(self, path: Path) -> None:
        pass

    def close(self, status: Status | None) -> None:
        self.board.close()


def require_extras(names: Sequence[TrackerName]) -> None:
    """Raise `MissingExtraError` unless the libraries of these trackers are installed; nothing is imported."""
    for name in names:
        if name != "tensorboard":
            require_extra(name)


class Trackers:
    """The trackers of one process. A failing tracker is left out, with a warning.

    `start` is the step from which a training continues, 0 for a new one; its trackers are those of `config.log`. None
    adds to a run that was trained before, at all trackers that know it.

    Raises:
        TrainingError: a tracker of a training cannot start.
    """

    def __init__(self, run: Path, config: TrainConfig, start: int | None) -> None:
        self.run = run
        self._open: dict[str, Tracker] = {}
        self._logged_before: dict[tuple[str, str], Container[int]] = {}
        ids = _read_ids(run) if start != 0 else {}
        board = ["tensorboard"] if (run / "tensorboard").is_dir() else []
        for name in config.log if start is not None else [*board, *ids]:
            try:
                self._open[name] = _open_tracker(name, run, config, start, ids.get(name))
            except Exception as error:  # of many libraries, without a common base
                if start is None:
                    log.warning("cannot add to %s (%s)", name, _first_line(error))
                    continue
                self.close("failed")
                hint = "correct that, or choose other trackers with --log"
                raise TrainingError(f"cannot log to {name} ({_first_line(error)}); {hint}") from error
        opened = {name: tracker.id for name, tracker in self._open.items() if tracker.id is not None}
        if {**ids, **opened} != ids:
            write_atomic(run / IDS_FILE, to_json({**ids, **opened}))

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, next(iter(values)), lambda tracker: tracker.log_scalars(step, values))

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        self._log(step, next(iter(images)), lambda tracker: tracker.log_images(step, images))

    def log_evaluation(self, step: int, name: str, rows: Rows) -> None:
        """Log an evaluation's summary: as a table, and the values of the generator as scalars."""
        scalars = {
            f"{name}/{row['protocol']}/{row['mask']}/{key.removesuffix('_mean')}": float(value)
            for row in rows
            if row["method"] == "generated"
            for key, value in row.items()
            if key.endswith("_mean") and value is not None
        }
        used = {key for row in rows for key, value in row.items() if value is not None}
        columns = [*KEYS, *sorted(used - {*KEYS, "definition"})]
        table = [{column: row.get(column) for column in columns} for row in rows]
        self._each(lambda tracker: tracker.log_table(step, name, table))
        if scalars:
            self._log(step, next(iter(scalars)), lambda tracker: tracker.log_scalars(step, scalars), in_order=False)

    def log_file(self, path: Path) -> None:
        self._each(lambda tracker: tracker.log_file(path))

    def close(self, status: Status | None) -> None:
        self._each(lambda tracker: tracker.close(status))
        self._open.clear()

    def _log(self, step: int, name: str, call: Callable[[Tracker], None], *, in_order: bool = True) -> None:
        """Call each tracker, unless another process logged `name` at this step already, since trackers only append.

        A training is `in_order`: every step up to the last one of a process that was killed is left as it was logged,
        even if the resumed one has other steps. Evaluations may be of any step.
        """

        def if_new(tracker: Tracker, key: str) -> None:
            if (key, name) not in self._logged_before:
                steps = tracker.steps_of(name)
                self._logged_before[key, name] = range(max(steps, default=-1) + 1) if in_order else steps
            if step not in self._logged_before[key, name]:
                call(tracker)

        self._each(if_new, with_key=True)

    def _each(self, call: Callable[..., None], with_key: bool = False) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker, name) if with_key else call(tracker)
            except Exception as error:  # a training must not end because a tracker does
                del self._open[name]
                log.warning("no longer logging to %s (%s); the CSV files have everything", name, _first_line(error))


def _read_ids(run: Path) -> dict[str, str]:
    recorded = read_json(run / IDS_FILE)
    known = recorded.items() if isinstance(recorded, dict) else ()
    return {name: each for name, each in known if name in get_args(TrackerName) and isinstance(each, str)}


def _open_tracker(name: str, run: Path, config: TrainConfig, start: int | None, known: str | None) -> Tracker:
    if name == "mlflow":
        from model.tracker_mlflow import MlflowTracker

        return MlflowTracker(run, config, start, known)
    if name == "trackio":
        from model.tracker_trackio import TrackioTracker

        return TrackioTracker(run, config, start, known)
    return TensorBoard(run, config, start)


def _first_line(error: Exception) -> str:
    """Without secrets: libraries quote the address that they were given."""
    return redacted((str(error).strip().splitlines() or [""])[0]) or type(error).__name__
