"""python examples/train_your_own.py ixi-data [STEPS]

Train a network of your own on the latest version of the dataset. The whole split is in memory, already paired and
indexed, so the loop needs no data loader.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

from ixi_etl.dataset.versions import find_version
from model.data import load_pairs


def main(root: str, steps: int = 100) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    version = find_version(root, "ixi-t1-t2@latest")
    pairs = load_pairs(version, "train", "t1->t2", device)

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 1)
    ).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        index = torch.randint(len(pairs), (4,), device=device)
        source, target = pairs.normalised(index)  # float32 (B, 1, H, W) in [-1, 1]
        loss = nn.functional.l1_loss(network(source), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == steps or step % 50 == 0:
            print(f"step {step}: L1 {loss.item():.4f}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
