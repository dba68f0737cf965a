"""Make the configured Prefect server ready: work pools, the deployments of `prefect.yaml`, and what ends lost runs.

    make deploy        # which runs: python -m flows.deploy

It may be run again at any time, and changes only what is its own. `prefect.yaml` takes from the environment where
things lie: IXI_ROOT (a folder that all workers see, or s3://bucket/prefix; by default `ixi-data`), IXI_SCRATCH (where
the root is on S3: the folder for archives and unfinished work), IXI_DASK (the scheduler to cut on; by default none:
threads of the worker) and IXI_PRESET (the preset of the trainings that new versions start; by default `smoke`, as
nobody may have a GPU: the published recipe, `paper`, has 49,200 steps).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from typing import get_args

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from flows.presets import Preset
from flows.server import check_server, errors_in_a_line
from ixi_etl.errors import IxiError

POOLS = {"cpu": "refreshes the dataset", "gpu": "trains"}
DEFAULTS = {"IXI_ROOT": "ixi-data", "IXI_SCRATCH": "", "IXI_DASK": "", "IXI_PRESET": "smoke"}

MISSED_BEATS = 3
"""A run that was silent for so many heartbeats is lost."""


def crash_lost_runs() -> AutomationCore:
    """What ends a run whose process was killed, or whose machine went away: it would stay Running for ever.

    How often runs beat is the setting `flows.heartbeat_frequency`, which must be the same here and for the workers.
    """
    beat = get_current_settings().flows.heartbeat_frequency or 180
    final = ("Completed", "Failed", "Cancelled", "Crashed")
    return AutomationCore(
        name="crash-lost-runs",
        description=f"A run that sent no heartbeat for {MISSED_BEATS * beat} s has crashed.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in final)},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=MISSED_BEATS * beat),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="No heartbeat: its process or machine is gone.")],
    )


async def prepare_server() -> None:
    """Create the pools that are missing, and put the automation in its present form."""
    async with get_client() as client:
        for name, purpose in POOLS.items():
            pool = WorkPoolCreate(
                name=name,
                type="process",
                description=purpose,
                base_job_template=ProcessWorker.get_default_base_job_template(),
            )
            with suppress(ObjectAlreadyExists):
                await client.create_work_pool(pool)
        automation = crash_lost_runs()
        for old in await client.read_automations_by_name(automation.name):
            if AutomationCore.model_validate(old.model_dump(exclude={"id"})) == automation:
                return  # to write it anew would make it forget the runs that it waits for
            await client.delete_automation(old.id)
        await client.create_automation(automation)


def main() -> None:
    """The command; exit status 1 and one line where no server is configured."""
    environment = DEFAULTS | {name: value for name, value in os.environ.items() if value or name not in DEFAULTS}
    if environment["IXI_PRESET"] not in get_args(Preset):
        sys.exit(f"error: IXI_PRESET is {environment['IXI_PRESET']}; set one of {', '.join(get_args(Preset))}")
    if not get_current_settings().api.url:
        sys.exit("error: no Prefect server is configured; set PREFECT_API_URL to its address (http://host:4200/api)")
    try:
        check_server()
        with errors_in_a_line():
            asyncio.run(prepare_server())
    except IxiError as error:
        sys.exit(f"error: {error}")
    deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    # Nothing of it is a person's text.
    sys.exit(subprocess.run(deploy, env=environment, check=False).returncode)  # noqa: S603  # nosec B603


if __name__ == "__main__":
    main()
