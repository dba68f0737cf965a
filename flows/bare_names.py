"""Let `prefect deployment run train-pix2pix` work; Prefect itself requires `train-pix2pix/train-pix2pix`.

A Prefect plugin (entry point `prefect.plugins` in pyproject.toml). It is enabled in this folder by `prefect.toml` and
in the image by its environment. Prefect calls the hook when it is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefect.plugins import register_hook

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.plugins import HookContext


@register_hook
def setup_environment(*, ctx: HookContext) -> None:
    """Extend the look-up by name to a bare name that exactly one deployment has."""
    from prefect.client.orchestration import PrefectClient

    by_full_name = PrefectClient.read_deployment_by_name

    async def read_deployment_by_name(client: PrefectClient, name: str) -> DeploymentResponse:
        from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

        if "/" not in name:
            wanted = DeploymentFilter(name=DeploymentFilterName(any_=[name]))
            found = await client.read_deployments(deployment_filter=wanted)
            if len(found) == 1:
                return found[0]
        return await by_full_name(client, name)  # no or several matches: the error of Prefect

    PrefectClient.read_deployment_by_name = read_deployment_by_name  # type: ignore[method-assign, assignment]
