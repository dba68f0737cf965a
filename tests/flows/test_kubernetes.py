"""The base job templates in kubernetes/, rendered as Prefect renders them. No cluster is needed, or reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from prefect.utilities.templating import apply_values, find_placeholders

FOLDER = Path(__file__).parents[2] / "kubernetes"
POOLS = ("cpu", "gpu")
GIVEN_BY_THE_WORKER = {"command": "prefect flow-run execute"}
CLAIM = {"name": "data", "persistentVolumeClaim": {"claimName": "ixi-data"}}


def template_of(pool: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{pool}-pool.json").read_text()))


def pod_of(pool: str, **values: object) -> dict[str, Any]:
    """The specification of the pod of a run, with these job variables."""
    template = template_of(pool)
    defaults = {name: field["default"] for name, field in template["variables"]["properties"].items()}
    chosen = defaults | GIVEN_BY_THE_WORKER | values
    jsonschema.validate(chosen, template["variables"])
    manifest = apply_values(template["job_configuration"], chosen)["job_manifest"]
    assert not find_placeholders(manifest)
    return dict(manifest["spec"]["template"]["spec"])


@pytest.mark.parametrize("pool", POOLS)
def test_every_placeholder_is_a_variable_with_a_default(pool: str) -> None:
    template = template_of(pool)
    used = {placeholder.name for placeholder in find_placeholders(template["job_configuration"])}
    assert used == set(template["variables"]["properties"])


@pytest.mark.parametrize("pool", POOLS)
def test_run_is_unprivileged_and_writes_to_volumes_alone(pool: str) -> None:
    pod = pod_of(pool)
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000  # the user of the image
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"/data", "/tmp"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["image"] == f"ixi-etl:{pool}"
    assert container["envFrom"] == [{"secretRef": {"name": "ixi-secrets", "optional": True}}]
    assert not {name for name in container["env"] if name.endswith(("KEY", "PASSWORD", "AUTH_STRING"))}


def test_only_the_gpu_pool_asks_for_a_gpu_and_shared_memory() -> None:
    [cpu], [gpu] = pod_of("cpu")["containers"], pod_of("gpu")["containers"]
    assert set(cpu["resources"]["limits"]) == {"cpu", "memory"}
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {mount["mountPath"] for mount in gpu["volumeMounts"]} - {m["mountPath"] for m in cpu["volumeMounts"]} == {
        "/dev/shm"
    }


@pytest.mark.parametrize("pool", POOLS)
def test_data_may_be_a_claim(pool: str) -> None:
    assert CLAIM in pod_of(pool, data_volume=CLAIM)["volumes"]
