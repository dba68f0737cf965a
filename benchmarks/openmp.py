"""Measure what waiting OpenMP threads cost a training step, on an idle machine and on a busy one::

    python -m benchmarks.openmp                 # 3 runs of each case; some minutes
    python -m benchmarks.openmp --steps 20 --runs 1 --busy 3

Each case trains the networks of the smoke preset on random images, in its own process: with libgomp's default, with
`OMP_WAIT_POLICY=PASSIVE`, and with the setting of `model`. The losses must be equal to the last digit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

# `model` keeps settings of the environment; 300,000 is libgomp's default.
CASES = {
    "default": {"GOMP_SPINCOUNT": "300000"},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "chosen": {},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
WARM_UP = 3


def train(steps: int) -> None:
    """Print milliseconds per step (mean) and the losses of the last one, as JSON."""
    from model.config import preset
    from model.devices import keep_freed_memory
    from model.trainer import Trainer

    import torch  # isort: skip - after `model`, which sets how threads wait

    from benchmarks.training import batches

    keep_freed_memory()
    config = preset("smoke", device="cpu", precision="fp32")
    assert config.side is not None
    trainer = Trainer(config, torch.device("cpu"))
    images = batches(WARM_UP + steps, config.batch_size, config.side)
    start, losses = 0.0, torch.zeros(0)
    for number, (source, target) in enumerate(images):
        if number == WARM_UP:
            start = time.perf_counter()
        losses = trainer.step(source, target, config.lr)
    milliseconds = (time.perf_counter() - start) / steps * 1e3
    print(json.dumps({"ms": milliseconds, "losses": [loss.hex() for loss in losses.tolist()]}))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Run processes that compute without end during the block."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(case: dict[str, str], steps: int) -> tuple[float, list[str]]:
    """Milliseconds per step and the last losses of a training process with these environment variables."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | case
    line = [sys.executable, "-m", "benchmarks.openmp", "--one", "--steps", str(steps)]
    found = json.loads(subprocess.run(line, env=env, capture_output=True, text=True, check=True).stdout)
    return found["ms"], found["losses"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of each run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each case, in turns")
    parser.add_argument("--busy", type=int, default=3, help="number of computing processes on the busy machine")
    parser.add_argument("--spin", type=int, nargs="*", default=[], help="more values of GOMP_SPINCOUNT to measure")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        train(given.steps)
        return
    cases = CASES | {str(count): {"GOMP_SPINCOUNT": str(count)} for count in given.spin}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; ms per step: median (minimum to maximum)\n")
    print(f"| machine | {' | '.join(cases)} |\n|{'---|' * (len(cases) + 1)}")
    all_losses = set()
    for processes in (0, given.busy):
        taken: dict[str, list[float]] = {name: [] for name in cases}
        with busy(processes):
            for _ in range(given.runs):
                for name, case in cases.items():
                    milliseconds, losses = measure(case, given.steps)
                    taken[name].append(milliseconds)
                    all_losses.add(tuple(losses))
        shown = [f"{median(ms):.0f} ({min(ms):.0f} to {max(ms):.0f})" for ms in taken.values()]
        print(f"| {f'{processes} busy processes' if processes else 'idle'} | {' | '.join(shown)} |", flush=True)
    if len(all_losses) != 1:
        sys.exit(f"the losses differ: {sorted(all_losses)}")
    print("\nthe losses of the last step are equal to the last digit in all runs")


if __name__ == "__main__":
    main()
