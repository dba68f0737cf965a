"""The scores of a subject match their definitions; each baseline is the best of its kind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL_NETWORKS
from scipy import stats

from flows.cli import main
from ixi_etl.dataset import metadata
from ixi_etl.dataset.publish import PublishedVersion
from ixi_etl.errors import CheckpointError
from ixi_etl.scans.intensity import otsu_threshold
from model import checkpoint, data, evaluate, generator, scores
from model.baselines import MAPPING, MEAN_TARGET, SOURCE, baselines
from model.config import TrainConfig
from model.data import Pairs
from model.evaluate import GENERATED, Evaluation
from model.jobs import evaluate_run
from model.networks import UNetGenerator
from model.protocols import PROTOCOLS
from model.run import Run, open_run
from model.train import validate
from model.trainer import Trainer


@pytest.fixture(scope="module")
def pairs(published: PublishedVersion) -> Pairs:
    return data.load_pairs(published.folder, "train")


def images(pairs: Pairs, subject: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and target of one subject, (Z, H, W) in [0, 1]."""
    index = torch.nonzero(pairs.subject == subject).flatten()
    source, target = pairs.normalised(index)
    return (source[:, 0].numpy() + 1) / 2, (target[:, 0].numpy() + 1) / 2


def row_of(table: pd.DataFrame, subject: str, method: str, mask: str) -> Any:
    found = table[(table["subject_id"] == subject) & (table["method"] == method) & (table["mask"] == mask)]
    assert len(found) == 1
    return found.iloc[0]


def test_scores_are_computed_over_the_slab_of_each_subject(pairs: Pairs) -> None:
    table = evaluate.measure(pairs, {SOURCE: lambda source, _: source}, protocols=("ours",))
    assert len(table) == 2 * len(pairs.subjects)
    for subject, name in enumerate(pairs.subjects):
        source, target = (x.astype(np.float64) for x in images(pairs, subject))
        whole = row_of(table, name, SOURCE, "whole")
        assert whole["mae"] == pytest.approx(np.abs(source - target).mean(), rel=1e-4)
        assert whole["psnr"] == pytest.approx(-10 * np.log10(((source - target) ** 2).mean()), rel=1e-4)
        low = [otsu_threshold(x.astype(np.float32) * 2 - 1) / 2 + 0.5 for x in (source, target)]
        head = (source > low[0]) | (target > low[1])
        assert 0.1 < head.mean() < 0.9
        inside = row_of(table, name, SOURCE, "head")
        assert inside["mae"] == pytest.approx(np.abs(source - target)[head].mean(), rel=1e-2)
        assert inside["psnr"] == pytest.approx(-10 * np.log10(((source - target) ** 2)[head].mean()), rel=1e-2)


def test_a_perfect_generator_gets_perfect_scores(pairs: Pairs) -> None:
    targets = iter(pairs.normalised(torch.arange(len(pairs)))[1].split(generator.BATCH))
    table = evaluate.measure(pairs, {GENERATED: lambda source, position: next(targets)}, protocols=("ours",))
    assert (table["mae"] == 0).all()
    assert table["ssim"].min() == pytest.approx(1)
    assert np.isposinf(table["psnr"]).all()


def test_validation_generates_in_bf16_and_measures_in_float32(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = iter(pairs.normalised(torch.arange(len(pairs)))[1].split(generator.BATCH))

    def perfect(source: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        assert torch.is_autocast_enabled("cpu")
        return next(targets)

    monkeypatch.setattr(generator, "as_predictor", lambda generator: perfect)
    config = TrainConfig.model_validate(SMALL_NETWORKS | {"side": 32, "precision": "bf16"})
    found = validate(Trainer(config, torch.device("cpu")), pairs)
    assert (found["ssim"], found["mae"]) == (pytest.approx(1, abs=1e-6), 0)


def test_ssim_equals_that_of_wang_et_al() -> None:
    rng = np.random.default_rng(0)
    a = rng.random((1, 1, 40, 40))
    b = np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1)
    ours = float(scores.score_slices(torch.from_numpy(a), torch.from_numpy(b))["ssim"])
    from scipy.ndimage import gaussian_filter

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x[0, 0], 1.5, truncate=3.5, mode="mirror")

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    wanted = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert ours == pytest.approx(wanted.mean(), abs=1e-6)


def test_the_mean_target_is_the_training_mean_of_each_slice(pairs: Pairs) -> None:
    method = baselines(pairs)[MEAN_TARGET]
    slabs = np.stack([images(pairs, s)[1] for s in range(len(pairs.subjects))])
    for z in range(slabs.shape[1]):
        got = method(torch.zeros(1, 1, *slabs.shape[2:]), torch.tensor([z]))
        np.testing.assert_allclose((got[0, 0].numpy() + 1) / 2, slabs[:, z].mean(axis=0), atol=1e-5)


def test_the_mapping_baseline_is_better_than_polynomials_on_the_training_split(pairs: Pairs) -> None:
    mapping = baselines(pairs)[MAPPING]
    source, target = pairs.normalised(torch.arange(len(pairs)))

    def mse(generated: torch.Tensor) -> float:
        return float(((generated - target) ** 2).mean())

    ours = mse(mapping(source, torch.zeros(len(source))))
    for degree in (0, 1, 3, 7):
        fitted = np.polynomial.Polynomial.fit(source.flatten().numpy(), target.flatten().numpy(), degree)
        assert ours < mse(torch.from_numpy(fitted(source.numpy())).float())
    assert ours < mse(source)


def test_differences_are_paired_and_positive_if_the_generator_is_better() -> None:
    rng = np.random.default_rng(0)
    subjects = [f"s{n}" for n in range(7)]
    difficulty = rng.normal(0, 5, 7)  # one for each subject, equal for all methods
    rows = []
    for method, psnr, mae in ((GENERATED, 30, 0.1), (SOURCE, 20, 0.3)):
        noise = rng.normal(0, 0.1, 7)
        rows.append(
            pd.DataFrame(
                {
                    "subject_id": subjects,
                    "protocol": "ours",
                    "method": method,
                    "mask": "whole",
                    "psnr": psnr + difficulty + noise,
                }
                | {"ssim": 0.5, "mae": mae + noise / 100}
            )
        )
    table = pd.concat([rows[0], rows[1].sample(frac=1, random_state=0)])
    found = evaluate.compare(table).set_index("measure")
    difference = (rows[0]["psnr"] - rows[1]["psnr"]).to_numpy()
    interval = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    assert found.loc["psnr", "better_by"] == pytest.approx(difference.mean())
    assert found.loc["psnr", ["low_95", "high_95"]].tolist() == pytest.approx(list(interval))
    assert found.loc["mae", "low_95"] > 0


def test_one_subject_has_a_difference_and_no_interval() -> None:
    row = {"subject_id": "a", "protocol": "ours", "mask": "whole", "psnr": 1.0, "ssim": 1.0, "mae": 1.0}
    found = evaluate.compare(pd.DataFrame([row | {"method": GENERATED}, row | {"method": SOURCE}]))
    assert found["better_by"].tolist() == [0, 0, 0]
    assert all(math.isnan(x) for x in found["low_95"])


def test_the_command_shows_a_dash_for_the_interval_of_one_subject(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"subject_id": "a", "protocol": "ours", "mask": "whole", "psnr": 1.0, "ssim": 1.0, "mae": 1.0}
    comparison = evaluate.compare(pd.DataFrame([row | {"method": GENERATED}, row | {"method": SOURCE}]))
    monkeypatch.setattr(
        "model.jobs.evaluate_run", lambda *_, **__: Evaluation(comparison, comparison, "evaluation-test")
    )
    command = ["evaluate", "a", "--root", str(trained)]
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, *options])
        assert not ended.value.code
        out = capsys.readouterr().out
        assert "nan" not in out.lower()
        if options:
            assert {entry["low_95"] for entry in json.loads(out)["comparison"]} == {None}
        else:
            assert "+0.0000 [-]" in out
            assert "no intervals: they need two subjects, and split test has one" in out


def test_the_command_skips_an_empty_comparison(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"subject_id": "a", "protocol": "syndiff", "mask": "whole", "psnr": math.nan}
    empty = evaluate.compare(pd.DataFrame([row | {"method": GENERATED}, row | {"method": SOURCE}]))
    assert list(empty.columns) == evaluate.COMPARED
    assert empty.empty
    monkeypatch.setattr("model.jobs.evaluate_run", lambda *_, **__: Evaluation(empty, empty, "evaluation-test"))
    for options in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", "a", "--root", str(trained), *options])
        assert not ended.value.code
        out = capsys.readouterr().out
        assert json.loads(out)["comparison"] == [] if options else "no comparison: no subject has a value" in out


def test_the_command_says_which_rows_have_no_interval(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"subject_id": name, "protocol": "ours", "mask": "whole", "psnr": psnr, "ssim": 0.5, "method": method}
        for name, psnr in (("a", 1.0), ("b", math.nan))
        for method in (GENERATED, SOURCE)
    ]
    comparison = evaluate.compare(pd.DataFrame(rows))
    done = Evaluation(pd.DataFrame({"subjects": [2]}), comparison, "evaluation-test")
    monkeypatch.setattr("model.jobs.evaluate_run", lambda *_, **__: done)
    with pytest.raises(SystemExit):
        main(["evaluate", "a", "--root", str(trained)])
    out = capsys.readouterr().out
    assert "a row without an interval has a value for one subject only" in out
    assert "no intervals" not in out


def test_dropout_is_off_unless_requested() -> None:
    torch.manual_seed(0)
    network = UNetGenerator(32, width=4)
    source, position = torch.rand(1, 1, 32, 32), torch.zeros(1)
    for dropout in (False, True):
        method = generator.as_predictor(network, dropout=dropout)
        with torch.no_grad():
            first, second = method(source, position), method(source, position)
        assert torch.equal(first, second) is not dropout
    assert network.training  # restored


def test_dropout_leaves_batch_norm_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    network = UNetGenerator(32, width=4, dropout=0.0, norm="batch")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    source, position = torch.rand(3, 1, 32, 32), torch.zeros(3)
    with torch.no_grad():
        on, off = (generator.as_predictor(network, dropout=dropout)(source, position) for dropout in (True, False))
    torch.testing.assert_close(on, off, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_slices_of_any_size_are_generated() -> None:
    generator = UNetGenerator(32, width=4).eval()
    source = torch.rand(2, 1, 64, 96) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(generator.forward_padded(source), generator(source))
        assert generator.forward_padded(source[..., :50, :70]).shape == (2, 1, 50, 70)


@pytest.fixture(scope="module")
def evaluated_once(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the run `a`, evaluated on the training split."""
    root = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained, root, symlinks=True, dirs_exist_ok=True)
    evaluate_run(open_run(root, "a"), split="train")
    return root


@pytest.fixture
def evaluated(evaluated_once: Path, tmp_path: Path) -> Run:
    """A copy of that run in its own root."""
    shutil.copytree(evaluated_once, tmp_path / "root", symlinks=True)
    return open_run(tmp_path / "root", "a")


def test_the_evaluation_files_have_scores_by_subject_and_their_conditions(evaluated_once: Path) -> None:
    run = open_run(evaluated_once, "a")
    table = pd.read_csv(run.folder / "evaluation-train.csv")
    subjects = metadata.read_metadata(run.version)["splits"]["train"]
    assert len(table) == subjects * 4 * (2 + 1 + 2 + 2)
    assert set(table["method"]) == {GENERATED, SOURCE, MEAN_TARGET, MAPPING}
    assert set(table["mask"]) == {"whole", "head", "foreground"}
    assert table["data_range"].tolist() == [PROTOCOLS[name].data_range for name in table["protocol"]]
    assert table["definition"].tolist() == [PROTOCOLS[name].link for name in table["protocol"]]
    assert table["normalisation"].str.contains("percentiles").all()
    record = json.loads((run.folder / "evaluation-train.json").read_text())
    assert record["step"] == 6
    ours = table[(table["protocol"] == "ours") & (table["method"] == SOURCE) & (table["mask"] == "whole")]
    row = next(r for r in record["summary"] if r["protocol"] == "ours" and r["method"] == SOURCE)
    assert row["psnr_mean"] == pytest.approx(ours["psnr"].mean())
    assert row["psnr_std"] == pytest.approx(ours["psnr"].std(), nan_ok=True)
    assert row["ms_ssim_mean"] is None  # the slices are too small
    assert {r["definition"] for r in record["summary"]} == {f"docs/protocols.md#{name}" for name in PROTOCOLS}
    assert record["protocols"].keys() == PROTOCOLS.keys()
    assert {name: entry["data_range"] for name, entry in record["protocols"].items()} == {
        name: protocol.data_range for name, protocol in PROTOCOLS.items()
    }
    assert record["masks"].keys() == {"whole", "head"}


def evaluations(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.folder.glob("evaluation-*")}


def save_with(run: Run, path: Path, **config: Any) -> Path:
    """Save the run's generator with another configuration."""
    tensors, record = checkpoint.load(run.generator)
    checkpoint.save(path, tensors, record | {"config": record["config"] | config})
    return path


@pytest.mark.parametrize(
    ("config", "difference"),
    [
        ({"dataset": "ixi-t1-t2@ffffffffffff"}, "dataset ixi-t1-t2@ffffffffffff, not ixi-t1-t2@"),
        ({"direction": "t2->t1"}, "direction t2->t1, not t1->t2"),
        ({"side": 64}, "side 64, not 32"),
    ],
)
def test_weights_of_another_training_are_refused_with_the_difference(
    config: dict[str, Any], difference: str, evaluated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluations(evaluated)
    other = save_with(evaluated, tmp_path / "other.safetensors", **config)
    if "side" in config:  # otherwise the shapes of the weights are refused first
        monkeypatch.setattr(evaluate.checkpoint, "require_tensors", lambda *_: None)
        monkeypatch.setattr(UNetGenerator, "load_state_dict", lambda *_: None)
    with pytest.raises(CheckpointError, match="is of another training run") as error:
        evaluate_run(evaluated, split="train", weights=other)
    assert difference in str(error.value)
    with pytest.raises(CheckpointError, match="is of another training run"):  # also as the generator of the run
        evaluate.evaluate(evaluated.folder, evaluated.version, evaluated.config, other, split="train")
    assert evaluations(evaluated) == before


def test_evaluations_with_other_weights_or_dropout_have_distinct_file_names(evaluated: Run, tmp_path: Path) -> None:
    before = evaluations(evaluated)
    saved = checkpoint.list_checkpoints(evaluated.folder / "checkpoints")[0]
    other_seed = save_with(evaluated, tmp_path / "generator.safetensors", seed=7)  # trained on the same data
    names = [
        evaluate_run(evaluated, split="train", weights=weights, dropout=dropout, protocols=("ours",)).name
        for weights, dropout in ((saved.path, False), (other_seed, True))
    ]
    assert names == [
        f"evaluation-train-step-{saved.step:08d}-{checkpoint.read_digest(saved.path)[:8]}-ours",
        f"evaluation-train-generator-{checkpoint.read_digest(other_seed)[:8]}-dropout-ours",
    ]
    assert evaluate.evaluation_name("train", other_seed, dropout=False) == names[1].removesuffix("-dropout-ours")
    assert evaluate.evaluation_name("train", None, dropout=True) == "evaluation-train-dropout"
    after = evaluations(evaluated)
    assert after.keys() == before.keys() | {f"{name}.{form}" for name in names for form in ("csv", "json")}
    assert {name: after[name] for name in before} == before
    assert json.loads(after[f"{names[1]}.json"])["weights_sha256"] == checkpoint.read_digest(other_seed)
    own = evaluate_run(evaluated, split="train", weights=evaluated.generator, protocols=("ours",))
    assert own.name == "evaluation-train-ours"  # the same as without `weights`


def test_an_evaluation_under_some_protocols_leaves_the_full_one_as_it_is(evaluated: Run) -> None:
    before = evaluations(evaluated)
    report = evaluate_run(evaluated, split="train", protocols=("selfrdb",)).name
    assert report == "evaluation-train-selfrdb"
    after = evaluations(evaluated)
    assert after.keys() == before.keys() | {f"{report}.csv", f"{report}.json"}
    assert {name: after[name] for name in before} == before
    record = json.loads(after[f"{report}.json"])
    assert "masks" not in record  # those of `ours`
    assert record["protocols"].keys() == {"selfrdb"}
    assert 'href="#protocol-syndiff"' in (evaluated.folder / "report.html").read_text()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_generator_whose_values_are_not_finite_is_refused(pairs: Pairs, value: float) -> None:
    broken = {GENERATED: lambda source, _: source.where(source < 0.9, value)}
    with pytest.raises(
        CheckpointError, match="method generated gives values that are not finite, from subject "
    ) as error:
        evaluate.measure(pairs, broken, protocols=("ours",))
    assert "\n" not in str(error.value)


def test_weights_without_metadata_are_refused(evaluated: Run, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    bare = tmp_path / "bare.safetensors"
    save_file(checkpoint.load(evaluated.generator)[0], bare)
    with pytest.raises(CheckpointError, match=r"bare\.safetensors is damaged or not a checkpoint of this project"):
        evaluate_run(evaluated, split="train", weights=bare)


def test_missing_or_damaged_weights_are_named(trained: Path, tmp_path: Path) -> None:
    run = open_run(trained, "a")
    damaged = tmp_path / "x.safetensors"
    damaged.write_bytes(run.generator.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        evaluate_run(run, split="train", weights=damaged)
    with pytest.raises(CheckpointError, match=r"there is no run zz in .*; there are: a"):
        open_run(trained, "zz")
