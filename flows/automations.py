"""The automations that `make deploy` keeps on the server: `crash-lost-runs`, and those of `flows.notifications`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.settings import get_current_settings

FLOWS = ("refresh-dataset", "train-pix2pix", "synthesize", "look-after")
"""The flows of this project. Automations leave runs of others on the same server alone."""

FINAL = tuple(f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed"))

MISSED_BEATS = 3
"""A run that misses this many heartbeats is lost."""

LOST = "No heartbeat: its process or machine is gone."


def of_our_flows(flows: Sequence[str] = FLOWS) -> dict[str, Any]:
    """The part of a trigger that restricts it to events of runs of these flows."""
    related: dict[str, str | list[str]] = {"prefect.resource.role": "flow", "prefect.resource.name": list(flows)}
    return {"match": {"prefect.resource.id": "prefect.flow-run.*"}, "match_related": related}


def heartbeat_s() -> int:
    """Seconds between two heartbeats. The setting must be the same here and for the workers."""
    return get_current_settings().flows.heartbeat_frequency or 180


def crash_lost_runs() -> AutomationCore:
    """The automation that crashes a run whose process or machine is gone, which would stay Running for ever.

    A run counts from its start, so one that is lost before its first heartbeat is found too. A suspended run has no
    process, so it sends no heartbeats. States in which the process lives (Paused, Cancelling) are not expected: each
    expected event ends the watch until the next heartbeat. The action does not force the state, so the server refuses
    it for a run in a final state, whatever the order in which events arrived.
    """
    beat = heartbeat_s()
    return AutomationCore(
        name="crash-lost-runs",
        description=f"Crash a run that has sent no heartbeat for {MISSED_BEATS * beat} s.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.Running", "prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", "prefect.flow-run.Suspended", *FINAL},
            **of_our_flows(),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=MISSED_BEATS * beat),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=LOST)],
    )


async def update_automations(client: PrefectClient, names: Iterable[str], wanted: Sequence[AutomationCore]) -> None:
    """Make the server have these automations, and no others of the `names`.

    An automation that is there already stays: replacing it would lose the runs that it waits for.
    """
    kept: list[AutomationCore] = []
    for name in names:
        for old in await client.read_automations_by_name(name):
            content = AutomationCore.model_validate(old.model_dump(exclude={"id"}))
            if content in wanted and content not in kept:
                kept.append(content)
            else:
                await client.delete_automation(old.id)
    for automation in wanted:
        if automation not in kept:
            await client.create_automation(automation)
