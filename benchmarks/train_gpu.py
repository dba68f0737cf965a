"""Speed and loss of the `paper` preset at full width on a GPU: bf16 and fp32 beside the reference, in one command.

::

    python -m benchmarks.train_gpu                               # makes its own dataset of simulated heads
    python -m benchmarks.train_gpu --root ixi-data --steps 5000  # on the latest version under a root
    python -m benchmarks.train_gpu --device cpu --steps 4        # only to see that it runs

Prints ms a step, images a second and peak memory of each precision, the reference implementation's step at the same
batch size in the same run, what a step computes and moves at the least, and both loss curves side by side. Our time is
that of the whole loop, drawing batches included; the reference's is of its step alone, its images on the device.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference import Pix2PixModel
from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.phantom import write_phantom
from ixi_etl.refresh import refresh
from model.config import preset
from model.run import prepare, train_run

SPLIT_SEED = 6  # of the phantom's six subjects, one is for validation and one for test
CURVE_ROWS = 10
REFERENCE_STEPS = 300
ADAM_BYTES = 28  # a weight: itself and two moments read and written, its gradient read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder with a published dataset; else one is simulated")
    parser.add_argument("--dataset", default="ixi-t1-t2@latest")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu --steps 4 shows that the benchmark runs")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        root = given.root or simulate(Path(scratch))
        curves = {}
        for precision in ("fp32", "bf16"):
            config = preset(
                "paper",
                dataset=given.dataset,
                steps=given.steps,
                batch_size=given.batch_size,
                device=given.device,
                precision=precision,
                checkpoint_every=given.steps,
                samples=0,
                log_every=max(1, given.steps // 40),
            )
            with tempfile.TemporaryDirectory(dir=scratch) as runs:
                run = prepare(root, config)
                run = replace(run, folder=Path(runs) / precision)
                train_run(run)
                curves[precision] = pd.read_csv(run.folder / "metrics.csv").set_index("step")
    device = torch.cuda.get_device_name() if given.device.startswith("cuda") else "CPU"
    print(
        f"\n{device}, torch {torch.__version__}, batch {given.batch_size}, {given.steps} steps, side {run.config.side}"
    )
    # The first tenth warms up: allocator, cuDNN's choice of algorithms.
    warm = {name: curve[curve.index > given.steps / 10] for name, curve in curves.items()}
    columns = ["ms_per_step", "images_per_s", "peak_memory_mb"]
    print(pd.DataFrame({name: curve[columns].median() for name, curve in warm.items()}).round(2).to_string())
    reference_ms, gflop, gigabytes = reference(given.device, given.batch_size, min(given.steps, REFERENCE_STEPS))
    rate = 1000 * given.batch_size / reference_ms
    print(f"reference, fp32 as published: {reference_ms:.2f} ms a step, {rate:.2f} images/s")
    ours = {name: reference_ms / curve["ms_per_step"].median() for name, curve in warm.items()}
    print("times as fast as the reference: " + ", ".join(f"{name} {times:.2f}" for name, times in ours.items()))
    print(
        f"a step computes {gflop:.0f} GFLOP and moves {gigabytes:.2f} GB for the weights: divide by the device's rates"
    )
    hours = {name: curve["ms_per_step"].median() * 49_200 / 3.6e6 for name, curve in warm.items()}
    print("49,200 such steps: " + ", ".join(f"{name} {h * 60:.1f} min" for name, h in hours.items()))
    both = pd.concat(
        {name: c[["loss_d", "loss_g_adversarial", "loss_g_reconstruction"]] for name, c in curves.items()}, axis=1
    )
    print(both.iloc[:: max(1, len(both) // CURVE_ROWS)].round(4).to_string())


def reference(device: str, batch: int, steps: int) -> tuple[float, float, float]:
    """The reference implementation's ms a step; GFLOP of a step, and GB that Adam alone must read and write in it."""
    torch.manual_seed(0)
    model = Pix2PixModel(device=device)
    images = [torch.rand(batch, 1, 256, 256, device=device) * 2 - 1 for _ in range(2)]
    model.set_input(*images)
    with FlopCounterMode(display=False) as counted:
        model.optimize_parameters()
    for _ in range(max(1, steps // 10)):
        model.optimize_parameters()
    _wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        model.optimize_parameters()
    _wait(device)
    taken = (time.perf_counter() - start) * 1000 / steps
    weights = sum(p.numel() for network in (model.netG, model.netD) for p in network.parameters())
    return taken, counted.get_total_flops() / 1e9, weights * ADAM_BYTES / 1e9


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def simulate(folder: Path) -> Path:
    """A root with a version of six simulated subjects on IXI's grid, not registered."""
    write_phantom(folder / "archives", subjects=6, seed=1)
    config = DatasetConfig(registration="none", pictures=False, split_seed=SPLIT_SEED)
    refresh(RefreshConfig(root=folder / "root", source=str(folder / "archives"), dataset=config))
    return folder / "root"


if __name__ == "__main__":
    main()
