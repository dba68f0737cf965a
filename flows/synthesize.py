"""Flow `synthesize`: volumes in, volumes of the other modality out. `model.synthesize` does it.

Run it without a server from Python, ``synthesize("latest", ["sub-01_T1w.nii.gz"], "out")``; or as a deployment::

    prefect deployment run synthesize/synthesize --param run=latest --param inputs='["/scans"]' --param out=/made
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import show_written
from flows.progress import show_progress
from ixi_etl.files import Progress
from model import synthesize as synthesis
from model.run import pick_device
from model.synthesize import Trained


@task(cache_policy=NO_CACHE)
def synthesize_volumes(trained: Trained, jobs: Sequence[tuple[Path, Path]], progress: Progress) -> list[Path]:
    return synthesis.synthesize(trained, jobs, progress)


@flow(name="synthesize", flow_run_name="synthesize with {run}", persist_result=False)
def synthesize(
    run: str,
    inputs: list[Path],
    out: Path,
    root: str | Path = "ixi-data",
    scratch: str | Path | None = None,
    device: str = "auto",
    dropout: bool = False,
    seed: int = 0,
) -> list[Path]:
    """Generate a volume from each input, which may be a file or a folder; the volumes written.

    Args:
        run: A run, the beginning of its name, or `latest`; or the file of a generator.
        inputs: NIfTI volumes (.nii, .nii.gz), or folders of them.
        out: A file for a single input, else a folder.
        root: Folder, or s3://bucket/prefix, that holds runs.
        scratch: Where the root is on S3: the folder of this machine to fetch a run into.
        device: `auto`, the GPU if there is one; else as torch names it.
        dropout: Leave dropout on, as published.
        seed: Of dropout's noise.
    """
    generator = synthesis.find_generator(root, run, Path(scratch) if scratch else None)
    trained = synthesis.load(generator, pick_device(device), dropout=dropout, seed=seed)
    jobs = synthesis.plan(inputs, out, trained.direction)
    get_run_logger().info("%d volumes with %s", len(jobs), generator)
    with show_progress() as progress:
        written = synthesize_volumes(trained, jobs, progress)
    show_written(written)
    return written
