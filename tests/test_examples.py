"""The scripts in `examples/` run on a small version and a small trained run."""

from __future__ import annotations

import runpy
import sys
import tarfile
from pathlib import Path

import nibabel as nib
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_read_a_version_prints_counts_and_a_subject(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_example("read_a_version.py", trained)
    out = capsys.readouterr().out
    assert "subjects are used" in out
    assert "missing_t2" in out
    assert "mean of the lowest T2 slice" in out


def test_open_a_version_reads_it_with_every_library(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_example("open_a_version.py", trained, tmp_path / "slab.nii.gz")
    out = capsys.readouterr().out
    assert "subjects used" in out
    assert "t1 (8, 1, " in out
    assert "-1 to 1" in out
    assert nib.aff2axcodes(nib.load(tmp_path / "slab.nii.gz").affine) == ("R", "A", "S")


def test_train_your_own_lowers_the_loss(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = []
    for steps in (1, 20):
        run_example("train_your_own.py", trained, steps)
        losses.append(float(capsys.readouterr().out.split()[-1]))
    assert losses[1] < losses[0]


def test_synthesize_a_volume_writes_it_on_the_grid_of_the_input(
    trained: Path, archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "T1.nii.gz", tmp_path / "T2.nii.gz"
    with tarfile.open(archives / "IXI-T1.tar") as tar:
        member = next(m for m in tar.getmembers() if m.name.startswith("IXI") and m.size)
        file = tar.extractfile(member)
        assert file
        source.write_bytes(file.read())
    run_example("synthesize_a_volume.py", trained, "a", source, out)
    output, given = nib.load(out), nib.load(source)
    assert output.shape == given.shape
    assert (output.affine == given.affine).all()
    assert "t1->t2" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_each_example_begins_with_the_command_that_runs_it(path: Path) -> None:
    assert path.read_text().startswith(f'"""python examples/{path.name} ')
