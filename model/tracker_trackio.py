"""Log a training run to Trackio, into its folder on this machine: `TRACKIO_DIR`, or by its own default in `HF_HOME`.

The project has the name of the dataset, the run that of its folder; ``trackio show`` opens the dashboard. With
`TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` Trackio sends the run there. Otherwise nothing leaves this machine: Trackio
would ask the Hugging Face Hub for the name of a user who is logged in, which `_local` prevents.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from model.config import TrainConfig
from model.tracker import Rows, Status, Tracker, params_of


class TrackioTracker(Tracker):
    """A run at Trackio; see `model.trackers.Trackers` for `start`, and `known`, the id of its run."""

    def __init__(self, run: Path, config: TrainConfig, start: int | None, known: str | None) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._storage = SQLiteStorage
        self._project = config.dataset.partition("@")[0]
        stored = SQLiteStorage.get_latest_run_record_by_name(self._project, run.name) if known else None
        self._resumed = stored is not None and stored["id"] == known
        if start is None and not self._resumed:
            raise LookupError(f"Trackio does not know run {run.name} of project {self._project} here")
        with _local(), redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                self._project,
                name=run.name,
                config=params_of(config),
                resume="must" if self._resumed else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.id = self._run.id

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step)

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        import trackio

        self._run.log({name: trackio.Image(path, caption=f"step {step}") for name, path in images.items()}, step)

    def log_table(self, step: int, name: str, rows: Rows) -> None:
        import pandas as pd
        import trackio

        self._run.log({name: trackio.Table(dataframe=pd.DataFrame(list(rows)))}, step)

    def log_file(self, path: Path) -> None:
        self._run.log_artifact(path, type="model")

    def close(self, status: Status | None) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()

    def steps_of(self, name: str) -> set[int]:
        if not self._resumed:
            return set()
        return {v["step"] for v in self._storage.get_metric_values(self._project, self._run.name, name, run_id=self.id)}


@contextmanager
def _local() -> Iterator[None]:
    """Forbid requests to the Hub, unless the environment names a Space or a server for Trackio."""
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = was_offline or not {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & os.environ.keys()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
