"""`make test` draws the same examples on every run, whatever ran before, and `make fuzz` draws more and new ones."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

TESTS = Path(__file__).parent
FIRST = 50


def drawn(profile: str, number: int | None = None) -> list[str]:
    """The first examples that a property test gets."""
    examples: list[str] = []

    def take(values: list[int | str | float]) -> None:
        examples.append(repr(values))

    test = settings(settings.get_profile(profile), database=None, max_examples=FIRST)(
        given(st.lists(st.integers() | st.floats()))(take)
    )
    (test if number is None else seed(number)(test))()
    return examples


def test_examples_depend_on_the_test_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the modules that other tests imported, in which Hypothesis looks for constants."""
    first = drawn("test")
    (tmp_path / "imported.py").write_text("".join(f"a{n} = {n * 12345}\n" for n in range(100)))
    spec = importlib.util.spec_from_file_location("imported", tmp_path / "imported.py")
    assert spec
    monkeypatch.setitem(sys.modules, "imported", importlib.util.module_from_spec(spec))
    assert drawn("test") == first


def test_a_fuzz_run_draws_by_its_seed_and_more() -> None:
    assert drawn("fuzz", 1) == drawn("fuzz", 1) != drawn("fuzz", 2)
    test, fuzz = settings.get_profile("test"), settings.get_profile("fuzz")
    assert fuzz.max_examples > test.max_examples
    assert (test.database is None, fuzz.database is None) == (True, False)


def test_no_profile_asserts_a_time() -> None:
    for name in ("test", "fuzz"):
        profile = settings.get_profile(name)
        assert profile.deadline is None
        assert HealthCheck.too_slow in profile.suppress_health_check


@pytest.mark.parametrize("path", sorted({*TESTS.rglob("test_*.py")} - {Path(__file__)}), ids=lambda path: path.stem)
def test_a_test_sets_only_how_many_examples_it_gets(path: Path) -> None:
    """By `examples`, so that `make fuzz` gets more; all else is the profile's, which a test would replace."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "settings":
            given_ = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given_.keys() == {"max_examples"}
            assert given_["max_examples"].startswith("examples(")
