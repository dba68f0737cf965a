"""Speed and loss of the `paper` preset at full width on a GPU: bf16 and fp32 beside the reference, in one command.

::

    python -m benchmarks.train_gpu                               # makes its own dataset of simulated heads
    python -m benchmarks.train_gpu --root ixi-data --steps 5000  # on the latest version under a root
    python -m benchmarks.train_gpu --device cpu --steps 4 --batch-size 1   # only to see that it runs

Prints, of each batch size, ms a step, images a second and peak memory of each precision, the reference implementation's
step in the same run, for how long the GPU is idle, what a step computes and moves at the least, and both loss curves
side by side. Our time is that of the whole loop, drawing batches included; the reference's is of its step alone, its
images on the device.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch.profiler import profile, supported_activities
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference import Pix2PixModel
from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.phantom import write_phantom
from ixi_etl.refresh import refresh
from model.config import TrainConfig, preset
from model.graph import EAGER_STEPS
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
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32], help="one after another")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu --steps 4 --batch-size 1 shows that the benchmark runs")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        root = given.root or simulate(Path(scratch))
        for batch in given.batch_size:
            tell(root, given.dataset, given.steps, batch, given.device)


def tell(root: Path, dataset: str, steps: int, batch: int, device: str) -> None:
    """Train at one batch size in each precision, and print what came of it."""
    curves, busy = {}, {}
    for precision in ("fp32", "bf16"):
        config = preset(
            "paper",
            dataset=dataset,
            steps=steps,
            batch_size=batch,
            device=device,
            precision=precision,
            checkpoint_every=steps,
            samples=0,
            log_every=max(1, steps // 40),
        )
        curves[precision], _ = trained(root, config)
        few = max(EAGER_STEPS + 2, steps // 20)
        at_work = [trained(root, config.model_copy(update={"steps": n}), profiled=True)[1] for n in (few, 2 * few)]
        busy[precision] = (at_work[1] - at_work[0]) / few  # without the validation, and the steps before the recording
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    print(f"\n{name}, torch {torch.__version__}, batch {batch}, {steps} steps")
    # The first tenth warms up: allocator, cuDNN's choice of algorithms, the recording of the step.
    warm = {name: curve[curve.index > steps / 10] for name, curve in curves.items()}
    columns = ["ms_per_step", "images_per_s", "peak_memory_mb"]
    print(pd.DataFrame({name: curve[columns].median() for name, curve in warm.items()}).round(2).to_string())
    ours = {name: curve["ms_per_step"].median() for name, curve in warm.items()}
    reference_ms, gflop, gigabytes = reference(device, batch, min(steps, REFERENCE_STEPS))
    print(f"reference, fp32 as published: {reference_ms:.2f} ms a step, {1000 * batch / reference_ms:.2f} images/s")
    print(
        "times as fast as the reference: " + ", ".join(f"{name} {reference_ms / ms:.2f}" for name, ms in ours.items())
    )
    if device.startswith("cuda"):
        print("GPU idle: " + ", ".join(f"{name} {1 - busy[name] / ms:.1%}" for name, ms in ours.items()))
    print(
        f"a step computes {gflop:.0f} GFLOP and moves {gigabytes:.2f} GB for the weights: divide by the device's rates"
    )
    print("49,200 such steps: " + ", ".join(f"{name} {ms * 49_200 / 6e4:.1f} min" for name, ms in ours.items()))
    both = pd.concat(
        {name: c[["loss_d", "loss_g_adversarial", "loss_g_reconstruction"]] for name, c in curves.items()}, axis=1
    )
    print(both.iloc[:: max(1, len(both) // CURVE_ROWS)].round(4).to_string())


def trained(root: Path, config: TrainConfig, profiled: bool = False) -> tuple[pd.DataFrame, float]:
    """What a training logged, by step; and for how many ms the GPU was at work, if that was asked for."""
    run = prepare(root, config)
    with tempfile.TemporaryDirectory() as folder:
        run = replace(run, folder=Path(folder) / "run")
        with profile(activities=list(supported_activities())) if profiled else nullcontext() as seen:
            train_run(run)
        kernels = [] if seen is None else seen.key_averages()
        busy = sum(event.self_device_time_total for event in kernels) / 1000
        return pd.read_csv(run.folder / "metrics.csv").set_index("step"), busy


def reference(device: str, batch: int, steps: int) -> tuple[float, float, float]:
    """The reference implementation's ms a step; GFLOP of a step, and GB that Adam alone must read and write in it."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as it sets it
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
