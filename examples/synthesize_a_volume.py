"""python examples/synthesize_a_volume.py ixi-data RUN T1.nii.gz T2.nii.gz

Generate a T2 volume from a T1 volume with the trained generator of a run. RUN is a run id, a unique prefix of one, or
latest. The output is on the grid of the input; the JSON file beside it records how it was made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib

from model.synthesize import find_generator, load_trained
from model.volumes import synthesize_file


def main(root: str, run: str, source: str, out: str) -> None:
    trained = load_trained(find_generator(root, run))
    written = synthesize_file(trained, Path(source), Path(out))
    volume = nib.load(written)
    sidecar = json.loads(Path(str(written).removesuffix(".gz")).with_suffix(".json").read_text())
    print(f"{written}: {volume.shape}, {trained.direction}")
    for warning in sidecar["Warnings"]:
        print(f"warning: {warning}")


if __name__ == "__main__":
    main(*sys.argv[1:])
