"""Flow `synthesize`: volumes in, volumes of another modality out, by `model.synthesize`.

Run it from Python, ``synthesize("latest", ["sub-01_T1w.nii.gz"], "out")``, or as a deployment::

    prefect deployment run synthesize/synthesize --param run=latest --param inputs='["/scans"]' --param out=/made
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import show_written
from flows.progress import show_progress
from ixi_etl.config import NO_SECRET
from ixi_etl.core.text import quantity
from model import outputs, volumes
from model import synthesize as synthesis
from model.devices import pick_device

synthesize_volumes = task(task_run_name="synthesize volumes", cache_policy=NO_CACHE)(volumes.synthesize)


@flow(name="synthesize", flow_run_name="synthesize with {run}", persist_result=False)
def synthesize(
    run: Annotated[str, NO_SECRET],
    inputs: list[Annotated[Path, NO_SECRET]],
    out: Annotated[Path, NO_SECRET],
    root: Annotated[str | Path, NO_SECRET] = "ixi-data",
    scratch: Annotated[str | Path | None, NO_SECRET] = None,
    device: Annotated[str, NO_SECRET] = "auto",
    dropout: bool = False,
    seed: int = 0,
    sources: list[Annotated[str, NO_SECRET]] | None = None,
) -> list[Path]:
    """Generate a volume from each input file or folder, or one from the files of all sources; return those written.

    Args:
        run: Name of a run, a unique prefix of it, or `latest`; or a generator file.
        inputs: NIfTI volumes (.nii, .nii.gz), or folders of them; empty if `sources` are given.
        out: A file for a single output, otherwise a folder.
        root: Folder, or s3://bucket/prefix, that holds runs.
        scratch: If the root is on S3: folder of this machine to fetch the run into.
        device: `auto` is the GPU if there is one; otherwise a torch device such as `cuda:1`.
        dropout: Keep dropout on, as published.
        seed: Seed of the dropout noise.
        sources: NAME=FILE of each source, for example ["t1=a.nii.gz", "pd=b.nii.gz"], for a generator that takes
            several. The output is on the grid of the first. A list, as servers do not keep the order of an object.
    """
    generator = synthesis.find_generator(root, run, Path(scratch) if scratch else None)
    trained = synthesis.load_trained(generator, pick_device(device), dropout=dropout, seed=seed)
    jobs = outputs.plan_outputs(inputs, out, trained.direction, sources or [])
    get_run_logger().info("%s with %s", quantity(len(jobs), "volume"), generator)
    with show_progress() as progress:
        written = synthesize_volumes(trained, jobs, progress)
    show_written(written)
    return written
