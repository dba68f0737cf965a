"""The numbers are those that they are called, by subject; the baselines are the best of their kind."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt -e '.[train]'")

from conftest import SMALL_NETWORKS  # noqa: E402

from flows.cli import main  # noqa: E402
from ixi_etl import dataset  # noqa: E402
from ixi_etl.publish import Refreshed  # noqa: E402
from model import checkpoint, data, evaluate, metrics  # noqa: E402
from model.checkpoint import CheckpointError  # noqa: E402
from model.config import TrainConfig  # noqa: E402
from model.data import Pairs  # noqa: E402
from model.evaluate import GENERATED, MAPPING, MEAN_TARGET, SOURCE, Evaluation  # noqa: E402
from model.learner import Learner  # noqa: E402
from model.networks import UNetGenerator  # noqa: E402
from model.run import Run, evaluate_run, open_run  # noqa: E402
from model.train import validate  # noqa: E402


@pytest.fixture(scope="module")
def pairs(published: Refreshed) -> Pairs:
    return data.load(published.folder, "train")


def images(pairs: Pairs, subject: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and target of one subject, (Z, H, W) in [0, 1]."""
    index = torch.nonzero(pairs.subject == subject).flatten()
    source, target = pairs.normalised(index)
    return (source[:, 0].numpy() + 1) / 2, (target[:, 0].numpy() + 1) / 2


def of(table: pd.DataFrame, subject: str, method: str, mask: str) -> Any:
    found = table[(table["subject_id"] == subject) & (table["method"] == method) & (table["mask"] == mask)]
    assert len(found) == 1
    return found.iloc[0]


def test_the_numbers_are_those_of_the_subject_s_slab(pairs: Pairs) -> None:
    table = evaluate.measure(pairs, {SOURCE: lambda source, _: source})
    assert len(table) == 2 * len(pairs.subjects)
    for subject, name in enumerate(pairs.subjects):
        source, target = (x.astype(np.float64) for x in images(pairs, subject))
        whole = of(table, name, SOURCE, "whole")
        assert whole["mae"] == pytest.approx(np.abs(source - target).mean(), rel=1e-4)
        assert whole["psnr"] == pytest.approx(-10 * np.log10(((source - target) ** 2).mean()), rel=1e-4)
        low = [evaluate.otsu_threshold(x.astype(np.float32) * 2 - 1) / 2 + 0.5 for x in (source, target)]
        head = (source > low[0]) | (target > low[1])
        assert 0.1 < head.mean() < 0.9
        inside = of(table, name, SOURCE, "head")
        assert inside["mae"] == pytest.approx(np.abs(source - target)[head].mean(), rel=1e-2)
        assert inside["psnr"] == pytest.approx(-10 * np.log10(((source - target) ** 2)[head].mean()), rel=1e-2)


def test_a_perfect_generator_is_told_so(pairs: Pairs) -> None:
    every = pairs.normalised(torch.arange(len(pairs)))[1]
    seen = iter(every.split(evaluate.BATCH))
    table = evaluate.measure(pairs, {GENERATED: lambda source, position: next(seen)})
    assert (table["mae"] == 0).all()
    assert table["ssim"].min() == pytest.approx(1)
    assert np.isposinf(table["psnr"]).all()


def test_validation_generates_in_bf16_and_measures_in_float32(pairs: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = iter(pairs.normalised(torch.arange(len(pairs)))[1].split(evaluate.BATCH))

    def perfect(source: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        assert torch.is_autocast_enabled("cpu")
        return next(targets)

    monkeypatch.setattr(evaluate, "generated_by", lambda generator: perfect)
    config = TrainConfig.model_validate(SMALL_NETWORKS | {"side": 32, "precision": "bf16"})
    found = validate(Learner(config, torch.device("cpu")), pairs)
    assert (found["ssim"], found["mae"]) == (pytest.approx(1, abs=1e-6), 0)


def test_ssim_is_the_one_of_wang_et_al() -> None:
    rng = np.random.default_rng(0)
    a = rng.random((1, 1, 40, 40))
    b = np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1)
    ours = float(metrics.by_slice(torch.from_numpy(a), torch.from_numpy(b))["ssim"])
    from scipy.ndimage import gaussian_filter

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x[0, 0], 1.5, truncate=3.5, mode="mirror")

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    wanted = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert ours == pytest.approx(wanted.mean(), abs=1e-6)


def test_the_mean_target_is_the_training_mean_of_each_slice(pairs: Pairs) -> None:
    method = evaluate.baselines(pairs)[MEAN_TARGET]
    slabs = np.stack([images(pairs, s)[1] for s in range(len(pairs.subjects))])
    for z in range(slabs.shape[1]):
        got = method(torch.zeros(1, 1, *slabs.shape[2:]), torch.tensor([z]))
        np.testing.assert_allclose((got[0, 0].numpy() + 1) / 2, slabs[:, z].mean(axis=0), atol=1e-5)


def test_no_other_mapping_of_intensities_is_better_on_the_training_split(pairs: Pairs) -> None:
    mapping = evaluate.baselines(pairs)[MAPPING]
    source, target = pairs.normalised(torch.arange(len(pairs)))

    def mse(generated: torch.Tensor) -> float:
        return float(((generated - target) ** 2).mean())

    ours = mse(mapping(source, torch.zeros(len(source))))
    for degree in (0, 1, 3, 7):
        fitted = np.polynomial.Polynomial.fit(source.flatten().numpy(), target.flatten().numpy(), degree)
        assert ours < mse(torch.from_numpy(fitted(source.numpy())).float())
    assert ours < mse(source)


def test_differences_are_paired_and_above_zero_where_the_generator_is_better() -> None:
    rng = np.random.default_rng(0)
    subjects = [f"s{n}" for n in range(7)]
    hard = rng.normal(0, 5, 7)  # some subjects are harder, for every method alike
    rows = []
    for method, psnr, mae in ((GENERATED, 30, 0.1), (SOURCE, 20, 0.3)):
        noise = rng.normal(0, 0.1, 7)
        rows.append(
            pd.DataFrame(
                {"subject_id": subjects, "method": method, "mask": "whole", "psnr": psnr + hard + noise}
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


def test_of_one_subject_there_is_a_difference_and_no_interval() -> None:
    row = {"subject_id": "a", "mask": "whole", "psnr": 1.0, "ssim": 1.0, "mae": 1.0}
    found = evaluate.compare(pd.DataFrame([row | {"method": GENERATED}, row | {"method": SOURCE}]))
    assert found["better_by"].tolist() == [0, 0, 0]
    assert all(math.isnan(x) for x in found["low_95"])


def test_the_command_shows_a_dash_for_the_interval_of_one_subject(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"subject_id": "a", "mask": "whole", "psnr": 1.0, "ssim": 1.0, "mae": 1.0}
    comparison = evaluate.compare(pd.DataFrame([row | {"method": GENERATED}, row | {"method": SOURCE}]))
    monkeypatch.setattr(
        "model.run.evaluate_run", lambda *_, **__: Evaluation(comparison, comparison, "evaluation-test")
    )
    command = ["evaluate", "a", "--root", str(trained)]
    for form in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, *form])
        assert not ended.value.code
        out = capsys.readouterr().out
        assert "nan" not in out.lower()
        if form:
            assert {entry["low_95"] for entry in json.loads(out)["comparison"]} == {None}
        else:
            assert "+0.0000 [-]" in out
            assert "no intervals: they take two subjects, and split test has one" in out


def test_dropout_is_off_in_synthesis_and_on_where_it_is_asked_for() -> None:
    torch.manual_seed(0)
    generator = UNetGenerator(32, width=4)
    source, position = torch.rand(1, 1, 32, 32), torch.zeros(1)
    for dropout in (False, True):
        method = evaluate.generated_by(generator, dropout=dropout)
        with torch.no_grad():
            first, second = method(source, position), method(source, position)
        assert torch.equal(first, second) is not dropout
    assert generator.training  # as it was


def test_whole_slices_of_any_size_are_generated() -> None:
    generator = UNetGenerator(32, width=4).eval()
    source = torch.rand(2, 1, 64, 96) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(generator.whole(source), generator(source))
        assert generator.whole(source[..., :50, :70]).shape == (2, 1, 50, 70)


@pytest.fixture(scope="module")
def evaluated_once(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the run `a`, evaluated on the training split as its own figures."""
    root = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained, root, symlinks=True, dirs_exist_ok=True)
    evaluate_run(open_run(root, "a"), split="train")
    return root


@pytest.fixture
def evaluated(evaluated_once: Path, tmp_path: Path) -> Run:
    """The same run in a root of its own."""
    shutil.copytree(evaluated_once, tmp_path / "root", symlinks=True)
    return open_run(tmp_path / "root", "a")


def test_a_run_is_measured_by_subject_with_what_was_measured_beside_each_number(evaluated_once: Path) -> None:
    run = open_run(evaluated_once, "a")
    table = pd.read_csv(run.folder / "evaluation-train.csv")
    subjects = dataset.read_facts(run.version)["splits"]["train"]
    assert len(table) == subjects * 4 * 2
    assert set(table["method"]) == {GENERATED, SOURCE, MEAN_TARGET, MAPPING}
    assert set(table["mask"]) == {"whole", "head"}
    assert (table["data_range"] == 1).all()
    assert table["normalisation"].str.contains("percentiles").all()
    facts = json.loads((run.folder / "evaluation-train.json").read_text())
    assert facts["step"] == 6
    mean = table[(table["method"] == SOURCE) & (table["mask"] == "whole")]["psnr"].mean()
    assert next(r for r in facts["summary"] if r["method"] == SOURCE)["psnr_mean"] == pytest.approx(mean)


def evaluations(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.folder.glob("evaluation-*")}


def saved_with(run: Run, path: Path, **config: Any) -> Path:
    """The run's generator as if it had been trained otherwise."""
    tensors, facts = checkpoint.load(run.generator)
    checkpoint.save(path, tensors, facts | {"config": facts["config"] | config})
    return path


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"dataset": "ixi-t1-t2@ffffffffffff"}, "dataset ixi-t1-t2@ffffffffffff, not ixi-t1-t2@"),
        ({"direction": "t2->t1"}, "direction t2->t1, not t1->t2"),
        ({"side": 64}, "side 64, not 32"),
    ],
)
def test_weights_of_another_training_are_refused_with_what_differs(
    config: dict[str, Any], said: str, evaluated: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = evaluations(evaluated)
    other = saved_with(evaluated, tmp_path / "other.safetensors", **config)
    if "side" in config:  # such weights have other shapes, which is not what is tested
        monkeypatch.setattr(evaluate.checkpoint, "require", lambda *_: None)
        monkeypatch.setattr(UNetGenerator, "load_state_dict", lambda *_: None)
    with pytest.raises(CheckpointError, match="is of another training") as error:
        evaluate_run(evaluated, split="train", weights=other)
    assert said in str(error.value)
    with pytest.raises(CheckpointError, match="is of another training"):  # also as if it were the run's own
        evaluate.evaluate(evaluated.folder, evaluated.version, evaluated.config, other, split="train")
    assert evaluations(evaluated) == before


def test_other_weights_and_dropout_are_filed_under_names_of_their_own(evaluated: Run, tmp_path: Path) -> None:
    before = evaluations(evaluated)
    saved = checkpoint.found(evaluated.folder / "checkpoints")[0]
    like = saved_with(evaluated, tmp_path / "generator.safetensors", seed=7)  # of the same data, with another seed
    names = [
        evaluate_run(evaluated, split="train", weights=weights, dropout=dropout).name
        for weights, dropout in ((saved.path, False), (like, True))
    ]
    assert names == [
        f"evaluation-train-step-{saved.step:08d}-{checkpoint.digest_of(saved.path)[:8]}",
        f"evaluation-train-generator-{checkpoint.digest_of(like)[:8]}-dropout",
    ]
    assert evaluate.name_of("train", like, dropout=False) == names[1].removesuffix("-dropout")
    assert evaluate.name_of("train", None, dropout=True) == "evaluation-train-dropout"
    after = evaluations(evaluated)
    assert after.keys() == before.keys() | {f"{name}.{form}" for name in names for form in ("csv", "json")}
    assert {name: after[name] for name in before} == before
    assert json.loads(after[f"{names[1]}.json"])["weights_sha256"] == checkpoint.digest_of(like)
    own = evaluate_run(evaluated, split="train", weights=evaluated.generator)
    assert own.name == "evaluation-train"  # named or not, it is the same


def test_weights_without_facts_are_refused(evaluated: Run, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    bare = tmp_path / "bare.safetensors"
    save_file(checkpoint.load(evaluated.generator)[0], bare)
    with pytest.raises(CheckpointError, match=r"bare\.safetensors is damaged or no checkpoint of this project"):
        evaluate_run(evaluated, split="train", weights=bare)


def test_weights_that_are_not_there_or_damaged_are_named(trained: Path, tmp_path: Path) -> None:
    run = open_run(trained, "a")
    damaged = tmp_path / "x.safetensors"
    damaged.write_bytes(run.generator.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        evaluate_run(run, split="train", weights=damaged)
    with pytest.raises(CheckpointError, match=r"there is no run zz in .*; there are: a"):
        open_run(trained, "zz")
