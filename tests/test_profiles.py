"""`make test` draws the same examples on every run, and `make fuzz` draws more and new ones."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

TESTS = Path(__file__).parent
COUNT = 50


def draw_examples(profile: str, number: int | None = None) -> list[str]:
    """The first examples of a property test with a profile and, optionally, a seed."""
    examples: list[str] = []

    def record(values: list[int | str | float]) -> None:
        examples.append(repr(values))

    test = settings(settings.get_profile(profile), database=None, max_examples=COUNT)(
        given(st.lists(st.integers() | st.floats()))(record)
    )
    (test if number is None else seed(number)(test))()
    return examples


def test_examples_do_not_depend_on_imported_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis collects constants from imported modules; the profile turns this off."""
    first = draw_examples("test")
    (tmp_path / "imported.py").write_text("".join(f"a{n} = {n * 12345}\n" for n in range(100)))
    spec = importlib.util.spec_from_file_location("imported", tmp_path / "imported.py")
    assert spec
    monkeypatch.setitem(sys.modules, "imported", importlib.util.module_from_spec(spec))
    assert draw_examples("test") == first


def test_fuzz_draws_more_examples_which_the_seed_decides() -> None:
    assert draw_examples("fuzz", 1) == draw_examples("fuzz", 1) != draw_examples("fuzz", 2)
    test, fuzz = settings.get_profile("test"), settings.get_profile("fuzz")
    assert fuzz.max_examples > test.max_examples
    assert (test.database is None, fuzz.database is None) == (True, False)


def test_no_profile_has_a_deadline() -> None:
    for name in ("test", "fuzz"):
        profile = settings.get_profile(name)
        assert profile.deadline is None
        assert HealthCheck.too_slow in profile.suppress_health_check


@pytest.mark.parametrize("path", sorted({*TESTS.rglob("test_*.py")} - {Path(__file__)}), ids=lambda path: path.stem)
def test_tests_set_only_the_number_of_examples(path: Path) -> None:
    """They set it through `examples`, so that `make fuzz` draws more. Any other setting would override the profile."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "settings":
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.keys() == {"max_examples"}
            assert keywords["max_examples"].startswith("examples(")
