"""Log a training run to MLflow: the server of `MLFLOW_TRACKING_URI`, by default an SQLite file of the data root::

    <root>/mlflow/mlflow.db, artifacts/         mlflow server --backend-store-uri sqlite:///<root>/mlflow/mlflow.db

The experiment has the name of the dataset, the run that of its folder. MLflow's own usage statistics are off, unless
`MLFLOW_DISABLE_TELEMETRY` is set to `false`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ixi_etl import __version__
from ixi_etl.core.storage import reject_url_credentials
from model.config import TrainConfig
from model.tracker import Rows, Status, Tracker, params_of

# These are read when MLflow is imported or first used.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # its own 7 wait four minutes for a server that is gone
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # standard output is that of the command

log = logging.getLogger(__name__)

FOLDER, DATABASE, ARTIFACTS = "mlflow", "mlflow.db", "artifacts"
STATUSES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def default_store(run: Path) -> Path:
    """The folder of the SQLite store for a run in `<root>/runs/<run id>`."""
    return run.absolute().parents[1] / FOLDER


class MlflowTracker(Tracker):
    """A run at MLflow; see `model.trackers.Trackers` for `start`, and `known`, the id of its run."""

    def __init__(self, run: Path, config: TrainConfig, start: int | None, known: str | None) -> None:
        given = os.environ.get("MLFLOW_TRACKING_URI")
        if given and given.lower().startswith(("http://", "https://")):
            variables = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"  # both are read by MLflow
            reject_url_credentials(given, f"take them out of MLFLOW_TRACKING_URI, and set {variables}")
        import mlflow
        from mlflow.exceptions import MlflowException

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # otherwise a new database prints its migrations
        store = default_store(run)
        if not given:
            if start is None and not (store / DATABASE).is_file():
                raise FileNotFoundError(f"{store / DATABASE} does not exist")
            store.mkdir(parents=True, exist_ok=True)
        self.client = mlflow.MlflowClient(given or f"sqlite:///{store / DATABASE}")
        if known is not None:
            try:
                self.client.get_run(known)
            except MlflowException as error:
                if start is None or error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                log.warning("MLflow does not know run %s of %s any more: a new one is started", known, run)
                known = None
        self._resumed = known is not None
        self.id = self._run_id = known or self._new_run(run.name, config, None if given else store)
        if known and start is not None:
            self.client.update_run(known, status="RUNNING")

    def _new_run(self, name: str, config: TrainConfig, store: Path | None) -> str:
        from mlflow.entities import Param

        dataset = config.dataset.partition("@")[0]
        found = self.client.get_experiment_by_name(dataset)
        location = (store / ARTIFACTS).as_uri() if store else None  # MLflow's default is in the working folder
        experiment = found.experiment_id if found else self.client.create_experiment(dataset, location)
        tags = {"dataset": config.dataset, "ixi-etl": __version__, "mlflow.source.name": "ixi-etl train"}
        run_id = str(self.client.create_run(experiment, run_name=name, tags=tags).info.run_id)
        self.client.log_batch(run_id, params=[Param(k, v) for k, v in params_of(config).items()])
        return run_id

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self.client.log_batch(self._run_id, metrics=[Metric(k, v, now, step) for k, v in values.items()])

    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        for name, path in images.items():
            with Image.open(path) as image:
                self.client.log_image(self._run_id, image.convert("RGB"), key=name, step=step)

    def log_table(self, step: int, name: str, rows: Rows) -> None:
        """Write the table as MLflow's `log_table` does, which would append to that of an earlier evaluation."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = {"columns": columns, "data": [[row.get(key) for key in columns] for row in rows]}
        self.client.log_text(self._run_id, json.dumps(table), f"{name}.json")
        tags = json.loads(self.client.get_run(self._run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        entry = {"path": f"{name}.json", "type": "table"}
        if entry not in tags:
            self.client.set_tag(self._run_id, "mlflow.loggedArtifacts", json.dumps([*tags, entry]))

    def log_file(self, path: Path) -> None:
        self.client.log_artifact(self._run_id, str(path), "model")

    def close(self, status: Status | None) -> None:
        if status is not None:
            self.client.set_terminated(self._run_id, STATUSES[status])

    def steps_of(self, name: str) -> set[int]:
        if not self._resumed:
            return set()
        history: Any = self.client.get_metric_history(self._run_id, name)
        images = self.client.list_artifacts(self._run_id, "images")  # images/NAME+step+STEP+timestamp+...
        parts = [file.path.removeprefix("images/").split("+") for file in images]
        return {point.step for point in history} | {int(p[2]) for p in parts if p[0] == name and len(p) > 2}
