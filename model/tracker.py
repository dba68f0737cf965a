"""What every tracker has: the interface that `model.trackers` calls."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from model.config import TrainConfig

Status = Literal["finished", "stopped", "failed"]
Rows = Sequence[Mapping[str, Any]]


class Tracker(ABC):
    """One run at one tracker.

    Attributes:
        id: what the tracker calls the run; None if it has no names for runs.
    """

    id: str | None = None

    @abstractmethod
    def log_scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def log_images(self, step: int, images: Mapping[str, Path]) -> None:
        """Log image files; the keys are their names."""

    @abstractmethod
    def log_table(self, step: int, name: str, rows: Rows) -> None: ...

    @abstractmethod
    def log_file(self, path: Path) -> None:
        """Keep a copy of a file, if the tracker keeps files."""

    @abstractmethod
    def close(self, status: Status | None) -> None:
        """Write what is buffered, and end the run; None leaves its status as it was."""

    def steps_of(self, name: str) -> set[int]:
        """The steps at which an earlier process logged the scalar or image `name`, if this one cannot replace it."""
        return set()


def params_of(config: TrainConfig) -> dict[str, str]:
    """The fields of a configuration as text; what is no string as JSON."""
    fields = config.model_dump(mode="json")
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
