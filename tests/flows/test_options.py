"""Command-line options take name, type, bounds, help and default from the pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from flows.cli import app, import_commands
from flows.cli.options import options_from
from flows.cli.runs import COMMON_FIELDS
from ixi_etl.config import DatasetConfig, DigitsConfig, DigitsDataset, RefreshConfig
from ixi_etl.core.option import Option
from model.config import TrainConfig

import_commands()
COMMANDS = {command.name: command for command in typer.main.get_command(app).commands.values()}  # type: ignore[attr-defined]


class Part(BaseModel):
    size: int = 1


class Settings(BaseModel):
    name: str = Field("a", description="name of the thing")
    count: Annotated[int, Field(ge=1, le=9)] = Field(3, description="how many")
    limit: Annotated[int, Field(ge=2)] | None = Field(None, description="at most")
    rate: Annotated[float, Field(gt=0)] = Field(0.5, description="per second")
    kind: Literal["x", "y"] = Field("x", description="x: first; y: second")
    shown: bool = Field(True, description="show it")
    range: Annotated[Literal["all"] | tuple[int, int], Option(type=tuple[int, int], metavar="START STOP")] = "all"
    hosts: Annotated[tuple[str, ...], Option(flag="--host")] = ()
    part: Part = Part()


def parse(*arguments: str, only: tuple[str, ...] = ()) -> Any:
    """Run a command: the options that it receives, or its output if it fails."""
    received: dict[str, Any] = {}
    app_under_test = typer.Typer()

    @app_under_test.command()
    @options_from(only=only, settings=Settings)
    def command(settings: dict[str, Any], other: int = 7) -> None:
        received.update(settings, other=other)

    done = CliRunner().invoke(app_under_test, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})
    return received if done.exit_code == 0 and received else done.output


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ("", {}),
        ("--name b --count 9", {"name": "b", "count": 9}),
        ("--limit 2 --rate 0.1 --kind y", {"limit": 2, "rate": 0.1, "kind": "y"}),
        ("--no-shown --range 2 5 --host u --host v", {"shown": False, "range": (2, 5), "hosts": ["u", "v"]}),
        ("--shown --other 1", {"shown": True, "other": 1}),
    ],
)
def test_command_receives_only_the_given_options(arguments: str, received: dict[str, Any]) -> None:
    assert parse(*arguments.split()) == {"other": 7} | received
    assert Settings.model_validate({k: v for k, v in received.items() if k != "other"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--count 10", "less than or equal to 9"),
        ("--limit 1", "greater than or equal to 2"),
        ("--kind z", "'x', 'y'"),
        ("--part 1", "No such option"),
    ],
)
def test_bounds_and_choices_of_the_field_are_enforced(arguments: str, message: str) -> None:
    assert message in parse(*arguments.split())


def test_help_shows_the_description_and_the_default() -> None:
    text = " ".join(parse("--help").split())
    assert "Name of the thing. [default: a]" in text
    assert "x: first; y: second. [default: x]" in text
    assert "Show it. [default: yes]" in text
    assert "At most." in text
    assert "START STOP" in text


def test_only_the_chosen_fields_get_options() -> None:
    assert parse("--name", "b", only=("name",)) == {"name": "b", "other": 7}
    assert "No such option" in parse("--count", "2", only=("name",))


@pytest.mark.parametrize(
    ("command", "models", "only"),
    [
        ("refresh", [RefreshConfig, DatasetConfig], ()),
        ("digits", [DigitsConfig, DigitsDataset], ()),
        ("train", [TrainConfig], COMMON_FIELDS),
        ("survey", [RefreshConfig], ("source", "insecure_hosts")),
    ],
)
def test_every_field_has_an_option_and_a_description(
    command: str, models: list[type[BaseModel]], only: tuple[str, ...]
) -> None:
    parameters = {parameter.name: parameter for parameter in COMMANDS[command].params}
    for model in models:
        for name, field in model.model_fields.items():
            is_group = isinstance(field.default, BaseModel)
            if not is_group and (not only or name in only):
                assert field.description, name
                is_hidden = any(isinstance(item, Option) and item.hidden for item in field.metadata)
                assert (name in parameters) != is_hidden, name
