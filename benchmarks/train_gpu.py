"""Speed and loss of the `paper` preset at full width on a GPU: bf16 and fp32 beside the reference, in one command.

::

    python -m benchmarks.train_gpu                               # makes its own dataset of simulated heads
    python -m benchmarks.train_gpu --root ixi-data --steps 5000  # on the latest version under a root
    python -m benchmarks.train_gpu --device cpu --steps 4 --batch-size 1   # only to see that it runs

Prints, of each batch size, ms a step, images a second and peak memory of each precision, the reference implementation's
step in the same run, for how long the GPU is idle, what a step computes and moves at the least, and the loss curves of
both precisions side by side; last of all, images a second of both at their best batch sizes. Our time is that of the
whole loop, drawing batches included; the reference's is of its step alone, its images on the device. On a GPU float32
is TF32 in convolutions, as PyTorch has it, for both.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.reference import Pix2PixModel
from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.phantom import write_phantom
from ixi_etl.refresh import refresh
from model import data
from model.config import TrainConfig, preset
from model.graph import EAGER_STEPS
from model.learner import Learner
from model.run import prepare, train_run

SPLIT_SEED = 6  # of the phantom's six subjects, one is for validation and one for test
CURVE_ROWS = 10
REFERENCE_STEPS = 300
TRACED_STEPS = 100
WAITING_US = 5  # between two kernels of one recording lies about 1 us; more, and the GPU waits for this machine
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
    if ":" in given.device:
        torch.cuda.set_device(given.device)
    with tempfile.TemporaryDirectory() as scratch:
        root = given.root or simulate(Path(scratch))
        rates = [tell(root, given.dataset, given.steps, batch, given.device) for batch in given.batch_size]
    ours, theirs = (max(of) for of in zip(*rates, strict=True))
    print(f"\nat the best batch size of each: {ours:.1f} images/s, the reference {theirs:.1f}: {ours / theirs:.2f} x")


def tell(root: Path, dataset: str, steps: int, batch: int, device: str) -> tuple[float, float]:
    """Train at one batch size in each precision, and print what came of it; images a second, ours and the
    reference's.
    """
    curves, idle, whole = {}, {}, {}
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
        curves[precision], whole[precision] = trained(root, config)
        if device.startswith("cuda"):
            idle[precision] = idle_shares(root, config)
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
    for name, (between, waiting) in idle.items():
        print(f"GPU idle, {name}: {between:.1%} of the time between kernels, {waiting:.1%} waiting for this machine")
    print(
        f"a step computes {gflop:.0f} GFLOP and moves {gigabytes:.2f} GB for the weights: divide by the device's rates"
    )
    print("49,200 such steps: " + ", ".join(f"{name} {ms * 49_200 / 6e4:.1f} min" for name, ms in ours.items()))
    print(
        f"these {steps}, with reading, validation and a checkpoint: "
        + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in whole.items())
    )
    both = pd.concat(
        {name: c[["loss_d", "loss_g_adversarial", "loss_g_reconstruction"]] for name, c in curves.items()}, axis=1
    )
    print(both.iloc[:: max(1, len(both) // CURVE_ROWS)].round(4).to_string())
    return 1000 * batch / min(ours.values()), 1000 * batch / reference_ms


def trained(root: Path, config: TrainConfig) -> tuple[pd.DataFrame, float]:
    """What a training logged, by step; and how many seconds all of it took."""
    gc.collect()  # learners hold their graphs, and graphs their learners
    run = prepare(root, config)
    with tempfile.TemporaryDirectory() as folder:
        run = replace(run, folder=Path(folder) / "run")
        start = time.perf_counter()
        train_run(run)
        taken = time.perf_counter() - start
        return pd.read_csv(run.folder / "metrics.csv").set_index("step"), taken


def idle_shares(root: Path, config: TrainConfig) -> tuple[float, float]:
    """The share of the time in which a GPU runs no kernel, of steps that are played back, drawing batches included;
    and the share of gaps so long that it must be waiting for this machine.
    """
    gc.collect()
    run = prepare(root, config)
    device = torch.device(run.config.device)
    torch.backends.cudnn.benchmark = True  # as `model.train.train` sets it
    pairs, learner = data.load(run.version, "train", run.config.direction, device), Learner(run.config, device)

    def steps(first: int, count: int) -> None:
        for step in range(first, first + count):
            learner.step(*data.draw(pairs, run.config, step * run.config.batch_size), run.config.lr_at(step))
        torch.cuda.synchronize()

    warm = 2 * EAGER_STEPS
    steps(0, warm)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        steps(warm, TRACED_STEPS)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or ()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    (first, end), gaps = spans[0], []
    for start, stop in spans[1:]:
        gaps.append(max(0.0, start - end))
        end = max(end, stop)
    total = end - first
    return sum(gaps) / total, sum(gap for gap in gaps if gap > WAITING_US) / total


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
