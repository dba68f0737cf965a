"""Let workers take secrets from Prefect's Secret blocks, by references in their work pools.

The variable IXI_SECRETS of `make deploy` names environment variables, separated by spaces. The variable
AWS_SECRET_ACCESS_KEY gets the value of the block `aws-secret-access-key` when a worker starts a run.

The references belong in the work pool, not in `prefect.yaml`: `prefect deploy` itself resolves those of `prefect.yaml`,
and would store the values in the deployment, where everybody who may use the server can read them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.exceptions import ObjectNotFound

from ixi_etl.errors import ConfigError


def block_of(variable: str) -> str:
    """`AWS_SECRET_ACCESS_KEY` -> `aws-secret-access-key`: names of blocks have lower-case letters, digits and dashes.

    Raises:
        ConfigError: `variable` is not the name of an environment variable in upper case.
    """
    if not re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", variable):
        raise ConfigError("IXI_SECRETS has an invalid name; give names of variables, such as AWS_SECRET_ACCESS_KEY")
    return variable.lower().replace("_", "-")


async def use_secret_blocks(client: PrefectClient, pools: Sequence[str], variables: Sequence[str]) -> None:
    """Add references to the blocks of `variables` to the environment of the runs of `pools`; keep the others.

    Raises:
        ConfigError: a name is invalid, or its block does not exist.
    """
    references = {}
    for variable in variables:
        block = block_of(variable)
        try:
            await client.read_block_document_by_name(block, "secret", include_secrets=False)
        except ObjectNotFound:
            raise ConfigError(
                f"there is no Secret block {block} for {variable} of IXI_SECRETS; create it on the page Blocks of the "
                "server, or correct IXI_SECRETS"
            ) from None
        references[variable] = f"{{{{ prefect.blocks.secret.{block} }}}}"
    for name in pools if references else ():
        template: dict[str, Any] = (await client.read_work_pool(name)).base_job_template
        environment = template["variables"]["properties"]["env"]
        environment["default"] = (environment.get("default") or {}) | references
        await client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
