"""Each protocol equals its published formula, written out here independently; averages follow its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from scipy.ndimage import gaussian_filter, uniform_filter
from skimage.filters import threshold_triangle

from ixi_etl.dataset.direction import Direction
from ixi_etl.errors import ConfigError
from model import evaluate, scores
from model.data import Pairs, Slabs
from model.evaluate import GENERATED
from model.protocols import MEASURES, PROTOCOLS, Protocol, Scores, Subject, parse_protocols, protocols_for

Image = np.ndarray
NAMES = tuple(PROTOCOLS)


def make_subject(seed: int, slices: int, height: int, width: int, blank: str = "") -> Subject:
    """Smooth random images with noise, in [0, 1]; the first slice of the image `blank` is 0."""
    rng = np.random.default_rng(seed)
    shape = (slices, height, width)

    def image() -> Image:
        smooth = gaussian_filter(rng.normal(size=shape), (0, 2, 2))
        return np.clip(smooth / (np.abs(smooth).max() + 1e-9) + rng.uniform(-0.1, 0.4, shape), 0, 1).astype(np.float32)

    target, source = image(), image()
    generated = np.clip(target + rng.normal(0, 0.1, shape), 0, 1).astype(np.float32)
    for name, values in (("generated", generated), ("target", target), ("source", source)):
        if name == blank:
            values[0] = 0
    head = (source > 0.3) | (target > 0.3)
    return Subject(generated, target, {"t1": source}, "t2", head, np.arange(slices))


subjects = st.builds(
    make_subject,
    seed=st.integers(0, 2**32 - 1),
    slices=st.integers(1, 3),
    height=st.integers(5, 40),
    width=st.integers(5, 40),
    blank=st.sampled_from(["", "generated", "target", "source"]),
)


# The formulas, for one slice in float64.


def ssim(x: Image, y: Image, largest: float) -> float:
    """With a uniform window of 7 x 7 and sample covariances, over the pixels whose window is inside the image."""
    if min(x.shape) < 7:
        return math.nan
    ux, uy = uniform_filter(x, 7), uniform_filter(y, 7)
    vx, vy, vxy = ((uniform_filter(a * b, 7) - ua * ub) * 49 / 48 for a, b, ua, ub in product(x, y, ux, uy))
    c1, c2 = (0.01 * largest) ** 2, (0.03 * largest) ** 2
    similarity = (2 * ux * uy + c1) * (2 * vxy + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
    return float(similarity[3:-3, 3:-3].mean())


def product(x: Image, y: Image, ux: Image, uy: Image) -> list[tuple[Image, Image, Image, Image]]:
    return [(x, x, ux, ux), (y, y, uy, uy), (x, y, ux, uy)]


def psnr(x: Image, y: Image, largest: float) -> float:
    return float(20 * np.log10(largest) - 10 * np.log10(np.square(x - y).mean()))


def crop_256_152(image: Image) -> Image:
    """The middle 256 x 152 pixels; a smaller image stands in the middle of zeros."""
    height, width = image.shape
    canvas = np.zeros((max(height, 256), max(width, 152)))
    top, left = (canvas.shape[0] - height) // 2, (canvas.shape[1] - width) // 2
    canvas[top : top + height, left : left + width] = image
    top, left = round((canvas.shape[0] - 256) / 2), round((canvas.shape[1] - 152) / 2)
    return canvas[top : top + 256, left : left + 152]


def syndiff(generated: Image, target: Image, _t1: Image) -> dict[tuple[str, str], float]:
    fake, real = crop_256_152(generated / generated.max()), crop_256_152(target / target.max())
    rmse = np.sqrt(((fake - real) ** 2).mean())
    return {("whole", "psnr"): 20 * np.log10(fake.max() / rmse), ("whole", "ssim"): ssim(real, fake, real.max())}


def selfrdb(generated: Image, target: Image, t1: Image) -> dict[tuple[str, str], float]:
    found = {}
    for name, mask in (("whole", np.ones_like(t1)), ("foreground", (t1 - t1.min()) / (t1.max() + 1e-8) > 0.1)):
        real, fake = (np.abs(x * mask) / np.abs(x * mask).mean() for x in (target, generated))
        found |= {(name, "psnr"): psnr(real, fake, real.max()), (name, "ssim"): ssim(real, fake, real.max())}
    return found


def moschetto(generated: Image, target: Image, _t1: Image) -> dict[tuple[str, str], float]:
    clipped = [np.clip(x, np.percentile(x, 5), np.percentile(x, 99.5)) for x in (generated, target)]
    fake, real = ((x - x.min()) / (x.max() - x.min() + 1e-8) for x in clipped)
    masked_fake, masked_real = (np.where(x > threshold_triangle(x), x, 0) for x in (fake, real))
    return {
        ("whole", "ssim"): ssim(real, fake, 1),
        ("whole", "mse"): float(((clipped[0] - clipped[1]) ** 2).mean()),
        ("foreground", "ssim"): ssim(masked_real, masked_fake, 1),
        ("foreground", "psnr"): psnr(masked_real, masked_fake, 1),
    }


FORMULAS: dict[str, Callable[[Image, Image, Image], dict[tuple[str, str], float]]] = {
    "syndiff": syndiff,
    "selfrdb": selfrdb,
    "moschetto": moschetto,
}


def by_formula(name: str, subject: Subject) -> pd.DataFrame:
    """A row per slice, a column per mask and measure."""
    images = subject.generated, subject.target, subject.sources["t1"]
    with np.errstate(divide="ignore", invalid="ignore"):
        return pd.DataFrame(
            [FORMULAS[name](*(x.astype(np.float64) for x in slices)) for slices in zip(*images, strict=True)]
        )


def scored(name: str, subject: Subject) -> Scores:
    with np.errstate(divide="ignore", invalid="ignore"):
        return PROTOCOLS[name].score(subject)


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=examples(25))
@given(subject=subjects)
def test_each_published_protocol_equals_its_formula(name: str, subject: Subject) -> None:
    wanted, found = by_formula(name, subject), scored(name, subject)
    assert {(mask, measure) for mask, measures in found.items() for measure in measures} == set(wanted.columns)
    assert found.keys() == PROTOCOLS[name].masks.keys()
    for mask, measure in wanted.columns:
        np.testing.assert_allclose(found[mask][measure], wanted[mask, measure], rtol=1e-6, atol=1e-6)


def test_the_mask_of_selfrdb_is_that_of_a_t1_wherever_it_is() -> None:
    subject = make_subject(0, 2, 20, 20)
    reverse = replace(subject, sources={"t2": subject.target}, target=subject.sources["t1"], target_name="t1")
    wanted = [selfrdb(*(x[0].astype(np.float64) for x in (reverse.generated, reverse.target, reverse.target)))]
    assert scored("selfrdb", reverse)["foreground"]["psnr"][0] == pytest.approx(wanted[0]["foreground", "psnr"])
    other = replace(subject, sources={"pd": subject.sources["t1"]})  # without a T1, the source
    for measure, values in scored("selfrdb", subject)["foreground"].items():
        np.testing.assert_array_equal(scored("selfrdb", other)["foreground"][measure], values)


@pytest.mark.parametrize(
    ("size", "first", "shape"),
    [
        ((256, 256), (0, 52), (256, 152)),
        ((257, 155), (0, 2), (256, 152)),  # half a pixel is rounded to the even one, as Python rounds
        ((259, 153), (2, 0), (256, 152)),
    ],
)
def test_the_crop_begins_where_torchvision_begins(
    size: tuple[int, int], first: tuple[int, int], shape: tuple[int, int]
) -> None:
    numbers = np.arange(size[0] * size[1], dtype=float).reshape(1, *size)
    cropped = scores.center_crop(numbers, 256, 152)
    assert cropped.shape == (1, *shape)
    assert cropped[0, 0, 0] == numbers[0, *first]


def test_a_smaller_image_is_padded_with_zeros_more_below_than_above() -> None:
    cropped = scores.center_crop(np.ones((1, 253, 149)), 256, 152)
    assert cropped.shape == (1, 256, 152)
    assert cropped.sum() == 253 * 149
    assert cropped[0, 0].sum() == cropped[0, :, 0].sum() == 0
    assert [int(np.flatnonzero(cropped[0].sum(axis=n))[0]) for n in (1, 0)] == [1, 1]


# The extras of `ours`.


def windowed(x: Image, y: Image) -> tuple[Image, Image]:
    """Maps of SSIM and of its contrast and structure term, with a Gaussian window of sigma 1.5."""

    def blur(image: Image) -> Image:
        return gaussian_filter(image, 1.5, truncate=3.5, mode="mirror")

    ux, uy = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - ux**2, blur(y * y) - uy**2, blur(x * y) - ux * uy
    contrast = (2 * vxy + 9e-4) / (vx + vy + 9e-4)
    similarity = contrast * (2 * ux * uy + 1e-4) / (ux**2 + uy**2 + 1e-4)
    return similarity, contrast


def ms_ssim(x: Image, y: Image) -> float:
    """Wang et al. (2003): contrast and structure at five scales; at the last with luminance and edges."""
    total = 1.0
    for weight in (0.0448, 0.2856, 0.3001, 0.2363):
        total *= max(windowed(x, y)[1][5:-5, 5:-5].mean(), 0) ** weight
        x, y = (image.reshape(len(image) // 2, 2, -1, 2).mean((1, 3)) for image in (x, y))
    return float(total * max(windowed(x, y)[0].mean(), 0) ** 0.1333)


def test_the_extra_measures_of_ours_equal_their_definitions() -> None:
    thick, wide = make_subject(1, 12, 20, 20), make_subject(1, 2, 176, 176)
    found = scored("ours", thick)["whole"]
    generated, target = (x.astype(np.float64) for x in (thick.generated, thick.target))
    assert found["nmae"] == pytest.approx(np.abs(generated - target).sum() / target.sum(), rel=1e-6)
    assert found["ssim_3d"] == pytest.approx(windowed(generated, target)[0][5:-5, 5:-5, 5:-5].mean(), abs=1e-6)
    slices = zip(*(x.astype(np.float64) for x in (wide.generated, wide.target)), strict=True)
    found = scored("ours", wide)["whole"]
    assert found["ms_ssim"].tolist() == pytest.approx([ms_ssim(*pair) for pair in slices], abs=1e-5)


def test_extra_measures_are_missing_where_they_are_not_defined() -> None:
    small = scored("ours", make_subject(1, 1, 32, 32))["whole"]
    assert np.isnan([small["ms_ssim"][0], small["ssim_3d"][0]]).all()
    subject = make_subject(1, 12, 20, 20)
    assert scored("ours", subject)["whole"]["ssim_3d"] > 0.1
    apart = replace(subject, positions=np.arange(0, 24, 2))  # a split by file
    assert np.isnan(scored("ours", apart)["whole"]["ssim_3d"]).all()
    black = replace(subject, target=np.zeros_like(subject.target))
    assert not np.isfinite(scored("ours", black)["whole"]["nmae"]).any()


# Averages.


def make_pairs(count: int, slices: int, side: int = 16, blank: int | None = 0) -> Pairs:
    """Pairs of random images; the first target slice of the subject `blank` is black."""
    rng = np.random.default_rng(0)
    stored = [torch.from_numpy(rng.integers(0, 256, (count, slices, side, side), np.int16)) for _ in range(2)]
    if blank is not None:
        stored[1][blank, 0] = 0
    slabs = [Slabs(image, torch.tensor([[0.0, 255.0]] * count)) for image in stored]
    return Pairs(Direction(("t1",), "t2"), [f"s{n}" for n in range(count)], (slabs[0],), slabs[1], "lower")


def per_slice(name: str, pairs: Pairs) -> pd.DataFrame:
    """The formula on each slice, the source being the generated image."""
    source, target = pairs.normalised(torch.arange(len(pairs)))
    source, target = ((x[:, 0].numpy().astype(np.float64) + 1) / 2 for x in (source, target))
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = [FORMULAS[name](x, y, x) for x, y in zip(source, target, strict=True)]
    return pd.DataFrame(rows).set_index(pairs.subject.numpy())


@pytest.mark.parametrize("name", FORMULAS)
def test_means_and_deviations_are_over_what_the_protocol_says(name: str) -> None:
    pairs = make_pairs(count=3, slices=4)
    table = evaluate.measure(pairs, {GENERATED: lambda source, _: source}, protocols=(name,))
    summary = evaluate.summarise(table).set_index("mask")
    slices = per_slice(name, pairs)
    for (mask, measure), values in slices.items():
        by_subject = values.groupby(level=0).mean()  # pandas leaves NaN out
        rows = table[table["mask"] == mask]
        assert rows[measure].tolist() == pytest.approx(by_subject.tolist(), abs=1e-6)
        averaged = by_subject if PROTOCOLS[name].averaged_over == "subjects" else values.dropna()
        assert summary.loc[mask, f"{measure}_mean"] == pytest.approx(averaged.mean(), abs=1e-6)
        assert summary.loc[mask, f"{measure}_std"] == pytest.approx(averaged.std(ddof=0), abs=1e-6)
    assert (summary["subjects"] == 3).all()
    if name != "moschetto":
        assert slices.isna().any(axis=None)
        assert rows["psnr_slices"].tolist() == [3, 4, 4]


def test_ours_averages_over_subjects_with_the_deviation_of_a_sample() -> None:
    table = evaluate.measure(make_pairs(3, 4), {GENERATED: lambda source, _: source}, protocols=("ours",))
    summary = evaluate.summarise(table).set_index("mask")
    for mask, rows in table.groupby("mask"):
        assert summary.loc[mask, "psnr_mean"] == pytest.approx(rows["psnr"].mean())
        assert summary.loc[mask, "psnr_std"] == pytest.approx(rows["psnr"].std(ddof=1))


def test_subjects_may_have_different_numbers_of_slices() -> None:
    class SomeSlices(Pairs):
        """Without the first two slices of the first subject."""

        def __len__(self) -> int:
            return super().__len__() - 2

        @property
        def subject(self) -> torch.Tensor:  # type: ignore[override]
            return super().subject[2:]

        @property
        def position(self) -> torch.Tensor:  # type: ignore[override]
            return super().position[2:]

        def normalised(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows = (index + 2).unsqueeze(1)
            subject = self.subject[index]
            return self.sources[0].normalised(rows, subject), self.target.normalised(rows, subject)

    whole = make_pairs(2, 4, blank=None)
    some = SomeSlices(**{field: getattr(whole, field) for field in whole.__dataclass_fields__})
    tables = [evaluate.measure(p, {GENERATED: lambda source, _: source}, protocols=("syndiff",)) for p in (whole, some)]
    assert [table["slices"].tolist() for table in tables] == [[4, 4], [2, 4]]
    assert tables[0]["psnr"][1] == tables[1]["psnr"][1]
    assert tables[1]["psnr"][0] == pytest.approx(per_slice("syndiff", whole)["whole", "psnr"][2:4].mean())


@pytest.mark.parametrize("slices", [1, 3])
def test_pooled_measures_have_no_deviation_over_slices(slices: int) -> None:
    side = scores.MS_SSIM_SIDE
    table = evaluate.measure(make_pairs(1, slices, side), {GENERATED: lambda source, _: source}, protocols=("ours",))
    whole = table[table["mask"] == "whole"].iloc[0]
    assert whole["slices"] == whole["ms_ssim_slices"] == slices
    assert math.isfinite(whole["ms_ssim_sd"])
    pooled = PROTOCOLS["ours"].pooled
    assert pooled == {"psnr", "ssim", "mae", "ssim_3d", "nmae"}
    assert table[[f"{m}_sd" for m in pooled]].isna().all(axis=None)
    assert (table[[f"{m}_slices" for m in pooled]] == 0).all(axis=None)


def test_each_measure_is_weighted_by_its_own_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uneven(type(PROTOCOLS["syndiff"])):  # type: ignore[misc]
        """PSNR of the first slice of the first subject is missing; SSIM is complete."""

        name = "uneven"

        def score(self, subject: Subject) -> Scores:
            values = subject.target.mean((1, 2)).astype(np.float64)
            partial = values.copy()
            if values[0] == 0:
                partial[:2] = np.nan
            return {"whole": {"psnr": partial, "ssim": values}}

    monkeypatch.setitem(PROTOCOLS, "uneven", Uneven())
    pairs = make_pairs(count=2, slices=3)  # the first slice of the first subject is black
    table = evaluate.measure(pairs, {GENERATED: lambda source, _: source}, protocols=("uneven",))
    assert table[["psnr_slices", "ssim_slices"]].to_numpy().tolist() == [[1, 3], [3, 3]]
    target = (pairs.normalised(torch.arange(6))[1].mean((1, 2, 3)).numpy() + 1) / 2
    (row,) = evaluate.summarise(table).to_dict("records")
    for measure, values in (("psnr", target[2:]), ("ssim", target)):
        assert row[f"{measure}_mean"] == pytest.approx(values.mean(), abs=1e-6)
        assert row[f"{measure}_std"] == pytest.approx(values.std(), abs=1e-6)


def test_every_method_is_scored_under_every_protocol_in_order() -> None:
    methods = {GENERATED: lambda source, _: source, "grey": lambda source, _: torch.full_like(source, 0.0)}
    table = evaluate.measure(make_pairs(2, 2), methods)
    keys = list(dict.fromkeys(table[evaluate.KEYS].itertuples(index=False, name=None)))
    assert keys == [(p.name, mask, method) for p in PROTOCOLS.values() for mask in p.masks for method in methods]
    assert table["subject_id"].tolist() == ["s0", "s1"] * len(keys)
    assert set(MEASURES) <= set(table.columns)
    compared = evaluate.compare(table)
    assert set(compared["protocol"]) == set(NAMES)
    assert set(compared["baseline"]) == {"grey"}
    assert "mse" in set(compared["measure"])


def test_torch_uses_as_many_threads_after_measuring_as_before() -> None:
    before = torch.get_num_threads()
    evaluate.measure(make_pairs(2, 1), {GENERATED: lambda source, _: source})
    assert torch.get_num_threads() == before


def test_a_new_protocol_is_one_small_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worst(Protocol):
        name = "worst"
        title = "Largest error"
        definition = "PSNR from the largest error of a slice."
        source = "this test"
        masks = {"whole": "every pixel"}  # noqa: RUF012 - as short as can be
        data_range = "1"
        averaged_over = "slices"
        ddof = 0

        def score(self, subject: Subject) -> Scores:
            return {"whole": {"psnr": -20 * np.log10(np.abs(subject.generated - subject.target).max((1, 2)))}}

    monkeypatch.setitem(PROTOCOLS, "worst", Worst())
    pairs = make_pairs(2, 3)
    table = evaluate.measure(pairs, {GENERATED: lambda source, _: source}, protocols=("worst",))
    source, target = pairs.normalised(torch.arange(len(pairs)))
    wanted = -20 * np.log10((source - target).abs().amax((1, 2, 3)).numpy() / 2)
    summary = evaluate.summarise(table)
    assert summary["psnr_mean"][0] == pytest.approx(wanted.mean())
    assert parse_protocols("worst") == ("worst",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("syndif", "there is no protocol syndif; did you mean syndiff?"),
        ("ours,selfdrb", "there is no protocol selfdrb; did you mean selfrdb?"),
        ("zzz", "there is no protocol zzz; there are ours, syndiff, selfrdb, moschetto"),
        (" , ", "--protocol names none; there are ours, syndiff, selfrdb, moschetto"),
    ],
)
def test_an_unknown_protocol_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_protocols(text)
    assert str(error.value) == problem


def test_protocols_are_named_in_any_order_and_scored_in_one() -> None:
    assert parse_protocols("moschetto, OURS") == ("ours", "moschetto")
    assert parse_protocols(",".join(NAMES)) == NAMES


def test_infinite_and_missing_scores_are_null_in_json() -> None:
    pairs = make_pairs(1, 1)
    table: Any = evaluate.measure(pairs, {GENERATED: lambda *_: pairs.normalised(torch.arange(1))[1]})
    summary = evaluate.summarise(table)
    assert np.isposinf(summary[summary["protocol"] == "ours"]["psnr_mean"]).all()
    text = summary.to_json(orient="records")
    assert "Infinity" not in text
    assert "NaN" not in text


def test_digits_are_scored_by_our_own_protocol_only() -> None:
    assert protocols_for("digits") == ("ours",)
    assert protocols_for("ixi-t1-t2") == tuple(PROTOCOLS)
