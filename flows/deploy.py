"""Prepare the configured Prefect server: work pools, deployments of `prefect.yaml`, automations and notifications.

    make deploy        # which runs: python -m flows.deploy

It can be run again at any time, and changes only its own objects. It reads these environment variables:

- IXI_ROOT: a folder that all workers see, or s3://bucket/prefix; by default `ixi-data`.
- IXI_SCRATCH: if the root is on S3, the folder for archives and unfinished work.
- IXI_DASK: the Dask scheduler to cut subjects on; by default the worker uses threads.
- IXI_PRESET: the preset of the training runs that new versions start; by default `smoke`, because a worker may have
  no GPU and the published recipe, `paper`, has 49,200 steps.
- IXI_TRAIN_AFTER: the minutes after which `look-after` starts a training that a new version has not; by default 15.
- IXI_NOTIFY: the address for notifications of failed and late runs, failed checks and outages. It is a webhook
  (https://..., which gets a POST of JSON with `title` and `text`), one of Slack
  (https://hooks.slack.com/services/...), mail (mailtos://user:password@host?to=name@example.org), or another URL of
  Apprise. The server keeps it, encrypted, in the block `ixi-notify`. Without it nobody is told, and the block and the
  automations of an earlier deploy are removed.
- IXI_SECRETS: names of variables that workers take from Secret blocks, separated by spaces (`flows.secret_blocks`).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from flows import notifications
from flows.automations import crash_lost_runs, update_automations
from flows.presets import Preset
from flows.secret_blocks import use_secret_blocks
from flows.server import check_server, errors_as_user_errors
from ixi_etl.errors import IxiError

POOLS = {"cpu": "refreshes the dataset", "gpu": "trains"}
DEFAULTS = {"IXI_ROOT": "ixi-data", "IXI_SCRATCH": "", "IXI_DASK": "", "IXI_PRESET": "smoke", "IXI_TRAIN_AFTER": "15"}


async def prepare_server(notify: str | None, secrets: Sequence[str]) -> None:
    """Create missing work pools, and update their references to Secret blocks and the automations.

    Args:
        notify: the URL for Apprise that notifications go to; None for no notifications.
        secrets: variables that workers take from Secret blocks.
    """
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
        await use_secret_blocks(client, list(POOLS), secrets)
        lost = crash_lost_runs()
        told = notifications.notifications(await notifications.save_block(client, notify)) if notify else []
        await update_automations(client, (lost.name, *notifications.NAMES), [lost, *told])
        if not notify:
            await notifications.delete_block(client)


def main() -> None:
    """Run the command; exit status 1 and a one-line error message outside a checkout, or if no server is configured."""
    if not Path("prefect.yaml").is_file():
        sys.exit("error: this folder has no prefect.yaml; deploy from a checkout of the project")
    environment = DEFAULTS | {name: value for name, value in os.environ.items() if value or name not in DEFAULTS}
    if environment["IXI_PRESET"] not in get_args(Preset):
        sys.exit(f"error: IXI_PRESET is {environment['IXI_PRESET']}; set one of {', '.join(get_args(Preset))}")
    if not environment["IXI_TRAIN_AFTER"].isdecimal():
        sys.exit(f"error: IXI_TRAIN_AFTER is {environment['IXI_TRAIN_AFTER']}; set a whole number of minutes")
    notify = environment.pop("IXI_NOTIFY", "")  # has a secret, and `prefect deploy` does not need it
    try:
        address = notifications.apprise_url(notify) if notify else None
    except IxiError as error:
        sys.exit(f"error: {error}")
    if not get_current_settings().api.url:
        sys.exit("error: no Prefect server is configured; set PREFECT_API_URL to its address (http://host:4200/api)")
    try:
        check_server()
        with errors_as_user_errors():
            asyncio.run(prepare_server(address, environment.get("IXI_SECRETS", "").split()))
    except IxiError as error:
        sys.exit(f"error: {error}")
    deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    # No user input.
    sys.exit(subprocess.run(deploy, env=environment, check=False).returncode)  # noqa: S603  # nosec B603


if __name__ == "__main__":
    main()
