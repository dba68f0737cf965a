"""Prepare the configured Prefect server: work pools, deployments of `prefect.yaml`, and an automation for lost runs.

    make deploy        # which runs: python -m flows.deploy

It can be run again at any time, and changes only its own objects. `prefect.yaml` reads these environment variables:

- IXI_ROOT: a folder that all workers see, or s3://bucket/prefix; by default `ixi-data`.
- IXI_SCRATCH: if the root is on S3, the folder for archives and unfinished work.
- IXI_DASK: the Dask scheduler to cut subjects on; by default the worker uses threads.
- IXI_PRESET: the preset of the training runs that new versions start; by default `smoke`, because a worker may have
  no GPU and the published recipe, `paper`, has 49,200 steps.

IXI_SECRETS names variables that workers take from Secret blocks (`flows.secret_blocks`).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
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
from flows.secret_blocks import use_secret_blocks
from flows.server import check_server, errors_as_user_errors
from ixi_etl.errors import IxiError

POOLS = {"cpu": "refreshes the dataset", "gpu": "trains"}
DEFAULTS = {"IXI_ROOT": "ixi-data", "IXI_SCRATCH": "", "IXI_DASK": "", "IXI_PRESET": "smoke"}

MISSED_BEATS = 3
"""A run that misses this many heartbeats is lost."""


def crash_lost_runs() -> AutomationCore:
    """The automation that crashes a run whose process or machine is gone, which would stay Running for ever.

    The setting `flows.heartbeat_frequency` must be the same here and for the workers.
    """
    beat = get_current_settings().flows.heartbeat_frequency or 180
    final = ("Completed", "Failed", "Cancelled", "Crashed")
    return AutomationCore(
        name="crash-lost-runs",
        description=f"Crash a run that has sent no heartbeat for {MISSED_BEATS * beat} s.",
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
    """Create missing work pools, and update their references to Secret blocks and the automation."""
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
        await use_secret_blocks(client, list(POOLS), os.environ.get("IXI_SECRETS", "").split())
        automation = crash_lost_runs()
        for old in await client.read_automations_by_name(automation.name):
            if AutomationCore.model_validate(old.model_dump(exclude={"id"})) == automation:
                return  # replacing it would lose the runs that it is waiting for
            await client.delete_automation(old.id)
        await client.create_automation(automation)


def main() -> None:
    """Run the command; exit status 1 and a one-line error message outside a checkout, or if no server is configured."""
    if not Path("prefect.yaml").is_file():
        sys.exit("error: this folder has no prefect.yaml; deploy from a checkout of the project")
    environment = DEFAULTS | {name: value for name, value in os.environ.items() if value or name not in DEFAULTS}
    if environment["IXI_PRESET"] not in get_args(Preset):
        sys.exit(f"error: IXI_PRESET is {environment['IXI_PRESET']}; set one of {', '.join(get_args(Preset))}")
    if not get_current_settings().api.url:
        sys.exit("error: no Prefect server is configured; set PREFECT_API_URL to its address (http://host:4200/api)")
    try:
        check_server()
        with errors_as_user_errors():
            asyncio.run(prepare_server())
    except IxiError as error:
        sys.exit(f"error: {error}")
    deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    # No user input.
    sys.exit(subprocess.run(deploy, env=environment, check=False).returncode)  # noqa: S603  # nosec B603


if __name__ == "__main__":
    main()
