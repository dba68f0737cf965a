"""Notifications of failed and late runs, failed checks of data, and outages, as automations of the server.

`IXI_NOTIFY` says where they go: see `flows.deploy`.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit
from uuid import UUID

from prefect.blocks.notifications import SlackWebhook
from prefect.client.orchestration import PrefectClient
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from pydantic import SecretStr

from flows.automations import FINAL, of_our_flows
from ixi_etl.errors import ConfigError

BLOCK = "ixi-notify"
NAMES = (
    "notify-failed-runs",
    "notify-failed-look-after",
    "notify-late-runs",
    "notify-failed-checks",
    "notify-outages",
)
JOBS = ("refresh-dataset", "train-pix2pix", "synthesize")

NOT_STARTED_AFTER = timedelta(minutes=10)
"""A run is late if it has not started so long after its time, or after a worker accepted it."""

HELP = "docs/operations.md, section 'When a run makes no progress'"

RUN = """\
{{ flow.name }}: {{ flow_run.state.name }}

Run: {{ flow_run.name }}
Message: {{ (flow_run.state.message or 'none').split() | join(' ') | truncate(600) }}
Page: {{ flow_run | ui_url }}
"""

FAILED_RUN = f"""{RUN}What to do: {{% if flow_run.state.name != 'Crashed' %}}what the message says; then {{% endif -%}}
start it again, by "Retry" on its page. A refresh or a training resumes.
See also: {HELP}
"""

LATE_RUN = f"""{RUN}It has not started within {NOT_STARTED_AFTER.seconds // 60} minutes.
What to do: see that a worker of its pool runs and has room: prefect work-pool ls
See also: {HELP}
"""

FAILED_CHECKS = """\
{{ event.resource.name or event.resource.id }}: checks failed in version {{ event.payload.version }}

Failed: {{ (event.payload.failed | string).split() | join(' ') | truncate(2000) }}
Root: {{ event.payload.root }}
{% if flow_run %}Page: {{ flow_run | ui_url }}
{% endif %}{% if event.payload.held -%}
The version is published, but no training was started on it.
What to do: read the version's report. To train on it all the same:
prefect deployment run train-pix2pix --param dataset={{ event.resource.id.split('.') | last }}@\
{{ event.payload.version }} --param root={{ event.payload.root }}
{%- else -%}
The version is published, and training was not held back.
What to do: read the version's report.
{%- endif %}
"""

OUTAGE = f"""\
Nothing was looked after for {{{{ event.payload.minutes }}}} min

Since: {{{{ event.payload.since }}}}
The Prefect server, or every worker of the pool cpu, was down.
What to do: see which runs are Late or were missed: prefect flow-run ls; start a missed refresh by hand
See also: {HELP}
"""


def apprise_url(given: str) -> str:
    """The address in `IXI_NOTIFY` as a URL of Apprise.

    A webhook gets a POST of JSON with `title` and `text`.

    Raises:
        ConfigError: it is no address that Apprise knows.
    """
    parts = urlsplit(given)
    url = given
    if parts.scheme in ("http", "https") and not _is_known(given):  # Slack's and some others are known as they are
        fields = {":message": "text", ":version": "", ":type": "", ":attachments": ""}
        query = urlencode(
            {f"-{name}": value for name, value in parse_qsl(parts.query, keep_blank_values=True)} | fields,
            quote_via=quote,
        )
        url = f"{parts.scheme.replace('http', 'json')}://{parts.netloc}{parts.path}?{query}"
    elif parts.scheme in ("mailto", "mailtos") and "format=" not in parts.query:
        url += ("&" if parts.query else "?") + "format=text"
    if not _is_known(url):
        raise ConfigError(
            "IXI_NOTIFY is not an address that can be notified; set a webhook (https://...), one of Slack, or mail "
            "(mailtos://...): docs/operations.md, section Notifications"
        )
    return url


def _is_known(url: str) -> bool:
    from apprise import Apprise

    logger = logging.getLogger("apprise")
    logger.disabled = True  # it would log the URL
    try:
        return Apprise.instantiate(url) is not None
    finally:
        logger.disabled = False


async def save_block(client: PrefectClient, url: str) -> UUID:
    """Save the address in the server's block, which encrypts it; return the block's id.

    Of Prefect's blocks, that for Slack passes any URL to Apprise. A block class of this project would have to be
    installed where the server runs.
    """
    return await SlackWebhook(url=SecretStr(url)).asave(BLOCK, overwrite=True, client=client)


async def delete_block(client: PrefectClient) -> None:
    """Delete the block of an earlier deploy, if there is one."""
    try:
        block = await client.read_block_document_by_name(BLOCK, SlackWebhook.get_block_type_slug())
    except ObjectNotFound:
        return
    await client.delete_block_document(block.id)


def notifications(block: UUID) -> list[AutomationCore]:
    """The automations that send notifications through a block."""

    def tell(name: str, description: str, trigger: dict[str, Any], subject: str, body: str) -> AutomationCore:
        action = SendNotification(block_document_id=block, subject=subject, body=body)
        full = EventTrigger(**{"for_each": {"prefect.resource.id"}, "threshold": 1} | trigger)
        return AutomationCore(name=name, description=description, trigger=full, actions=[action])

    failed, failed_look_after, late, checks, outages = NAMES
    is_failed = {
        "posture": Posture.Reactive,
        "expect": {"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"},
    }
    return [
        tell(
            failed,
            "Notify when a run fails or crashes.",
            is_failed | of_our_flows(JOBS),
            "{{ flow.name }}: {{ flow_run.state.name }}",
            FAILED_RUN,
        ),
        tell(
            failed_look_after,
            "Notify when look-after, which runs every 15 minutes, fails; at most once a day.",
            is_failed
            | of_our_flows(("look-after",))
            | {"for_each": {"related:flow:prefect.resource.id"}, "within": timedelta(days=1)},
            "{{ flow.name }}: {{ flow_run.state.name }}",
            FAILED_RUN,
        ),
        tell(
            late,
            "Notify when a run has not started long after its time.",
            {
                "posture": Posture.Proactive,
                "after": {"prefect.flow-run.Late", "prefect.flow-run.Pending"},
                # A run that waits for its deployment's slot is not late: the run before it may take a day.
                "expect": {"prefect.flow-run.Running", "prefect.flow-run.AwaitingConcurrencySlot", *FINAL},
                **of_our_flows(JOBS),
                "within": NOT_STARTED_AFTER,
            },
            "{{ flow.name }}: not started",
            LATE_RUN,
        ),
        tell(
            checks,
            "Notify when checks of a refreshed dataset fail.",
            {
                "posture": Posture.Reactive,
                "expect": {"ixi.dataset.checks_failed"},
                "match": {"prefect.resource.id": "ixi.dataset.*"},
            },
            "{{ event.resource.name or event.resource.id }}: checks failed",
            FAILED_CHECKS,
        ),
        tell(
            outages,
            "Notify after a time in which look-after, which runs every 15 minutes, did not run.",
            {
                "posture": Posture.Reactive,
                "expect": {"ixi.look-after.resumed"},
                "match": {"prefect.resource.id": "ixi.look-after"},
            },
            "the Prefect server or its worker was down",
            OUTAGE,
        ),
    ]
