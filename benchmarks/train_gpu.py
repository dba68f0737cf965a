"""Compare speed and loss of the `paper` preset at full width on a GPU, in bf16 and fp32, with plain PyTorch.

::

    python -m benchmarks.train_gpu                               # makes its own dataset of simulated heads
    python -m benchmarks.train_gpu --root ixi-data --steps 5000  # on the latest version under a root
    python -m benchmarks.train_gpu --device cpu --steps 4 --batch-size 1   # a trial run

Prints for each batch size: ms per step, images per second and peak memory of each precision, the time of a step of
`benchmarks.reference` in the same run, the share of time in which the GPU is idle, the least that a step computes and
moves, and the loss curves of both precisions side by side. The last line compares images per second at the best batch
size of each. Our time covers the whole loop including drawing batches; the reference's covers its step alone, with its
images on the device. Convolutions in float32 use TF32 on a GPU, which is PyTorch's default, for both.
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

from benchmarks import reference
from ixi_etl.config import DatasetConfig, RefreshConfig
from ixi_etl.recipes.ixi import refresh
from ixi_etl.testing.phantom import write_phantom
from model import data
from model.config import TrainConfig, preset
from model.cuda_graph import EAGER_STEPS
from model.jobs import prepare_run, train_run
from model.trainer import Trainer

SPLIT_SEED = 6  # of the phantom's six subjects, one is for validation and one for test
CURVE_ROWS = 10
REFERENCE_STEPS = 300
TRACED_STEPS = 100
WAITING_US = 5  # kernels of one CUDA graph are about 1 us apart; in a longer gap the GPU waits for the CPU
ADAM_BYTES = 28  # per weight: the weight and two moments read and written, the gradient read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder with a published dataset; by default one is simulated")
    parser.add_argument("--dataset", default="ixi-t1-t2@latest")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32], help="one after another")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no GPU found; use --device cpu --steps 4 --batch-size 1 for a trial run")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if ":" in given.device:
        torch.cuda.set_device(given.device)
    with tempfile.TemporaryDirectory() as scratch:
        root = given.root or simulate(Path(scratch))
        rates = [compare(root, given.dataset, given.steps, batch, given.device) for batch in given.batch_size]
    ours, theirs = (max(each) for each in zip(*rates, strict=True))
    print(f"\nat the best batch size of each: {ours:.1f} images/s, the reference {theirs:.1f}: {ours / theirs:.2f} x")


def compare(root: Path, dataset: str, steps: int, batch: int, device: str) -> tuple[float, float]:
    """Train at one batch size in each precision and print the results; return images per second, ours and the
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
        curves[precision], whole[precision] = train(root, config)
        if device.startswith("cuda"):
            idle[precision] = idle_shares(root, config)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    print(f"\n{name}, torch {torch.__version__}, batch {batch}, {steps} steps")
    # The first tenth warms up the allocator, cuDNN's choice of algorithms and the CUDA graph.
    warm = {name: curve[curve.index > steps / 10] for name, curve in curves.items()}
    columns = ["ms_per_step", "images_per_s", "peak_memory_mb"]
    print(pd.DataFrame({name: curve[columns].median() for name, curve in warm.items()}).round(2).to_string())
    ours = {name: curve["ms_per_step"].median() for name, curve in warm.items()}
    reference_ms, gflop, gigabytes = measure_reference(device, batch, min(steps, REFERENCE_STEPS))
    print(f"reference, fp32, batch norm: {reference_ms:.2f} ms per step, {1000 * batch / reference_ms:.2f} images/s")
    print(
        "times as fast as the reference: " + ", ".join(f"{name} {reference_ms / ms:.2f}" for name, ms in ours.items())
    )
    for name, (between, waiting) in idle.items():
        print(f"GPU idle, {name}: {between:.1%} of the time between kernels, {waiting:.1%} waiting for the CPU")
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


def train(root: Path, config: TrainConfig) -> tuple[pd.DataFrame, float]:
    """Train; return the logged metrics by step, and the seconds of the whole run."""
    gc.collect()  # trainers and their CUDA graphs refer to each other
    run = prepare_run(root, config)
    with tempfile.TemporaryDirectory() as folder:
        run = replace(run, folder=Path(folder) / "run")
        start = time.perf_counter()
        train_run(run)
        taken = time.perf_counter() - start
        return pd.read_csv(run.folder / "metrics.csv").set_index("step"), taken


def idle_shares(root: Path, config: TrainConfig) -> tuple[float, float]:
    """The share of time in which the GPU runs no kernel, over replayed steps including drawing batches; and the share
    of gaps longer than `WAITING_US`.
    """
    gc.collect()
    run = prepare_run(root, config)
    device = torch.device(run.config.device)
    torch.backends.cudnn.benchmark = True  # as in `model.train.train`
    pairs = data.load_pairs(run.version, "train", run.config.direction, device, run.config.neighbours)
    trainer = Trainer(run.config, device)

    def steps(first: int, count: int) -> None:
        for step in range(first, first + count):
            trainer.step(*data.draw_batch(pairs, run.config, step * run.config.batch_size), run.config.lr_at(step))
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


def measure_reference(device: str, batch: int, steps: int) -> tuple[float, float, float]:
    """The reference's ms per step; GFLOP of a step, and GB that Adam alone must read and write in it."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    trainer = reference.Trainer(device=device)
    source, target = (torch.rand(batch, 1, 256, 256, device=device) * 2 - 1 for _ in range(2))
    with FlopCounterMode(display=False) as counted:
        trainer.step(source, target)
    for _ in range(max(1, steps // 10)):
        trainer.step(source, target)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        trainer.step(source, target)
    _synchronize(device)
    ms = (time.perf_counter() - start) * 1000 / steps
    networks = (trainer.generator, trainer.discriminator)
    weights = sum(parameter.numel() for network in networks for parameter in network.parameters())
    return ms, counted.get_total_flops() / 1e9, weights * ADAM_BYTES / 1e9


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def simulate(folder: Path) -> Path:
    """A root with a version of six simulated subjects on IXI's grid, without registration."""
    write_phantom(folder / "archives", subjects=6, seed=1)
    config = DatasetConfig(registration="none", pictures=False, split_seed=SPLIT_SEED)
    refresh(RefreshConfig(root=folder / "root", source=str(folder / "archives"), dataset=config))
    return folder / "root"


if __name__ == "__main__":
    main()
