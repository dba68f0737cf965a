"""Command-line options made from the fields of pydantic models (`ixi_etl.config`, `model.config`).

A new field of the right model is a new option; nothing in this module changes:

- `refresh`: `DatasetConfig` if it changes bytes of a version, otherwise `RefreshConfig`.
- `digits`: `DigitsDataset` if it changes bytes of a version, otherwise `DigitsConfig`.
- `survey`: `RefreshConfig`; also add the name to the fields listed at `survey` in `flows/cli/datasets.py`.
- `train`: `TrainConfig`; also add the name to `COMMON_FIELDS` in `flows/cli/runs.py`, otherwise only `--set` takes it.

Options of other commands are parameters of their functions.

::

    @app.command()
    @options_from(config=RefreshConfig, dataset=DatasetConfig)
    def refresh(config: dict[str, Any], dataset: dict[str, Any], quiet: Quiet = False) -> None: ...

The help, bounds and default of an option are those of its `Field`. Each model parameter receives a dict of the options
that were given: a missing one keeps the default of the model, or the value of a preset.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import annotated_types
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ixi_etl.core.option import Option

Command = Callable[..., None]


def options_from(*, only: Sequence[str] = (), **models: type[BaseModel]) -> Callable[[Command], Command]:
    """Replace each parameter named in `models` by one option for each field of that model.

    A field that is a model itself gets no option; name it as a parameter of its own. `only` restricts the fields.
    """

    def decorate(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        command_parameters = [
            parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
            if name not in models
        ]
        groups = {group: dict(_options_of(model, only)) for group, model in models.items()}

        @wraps(command)
        def wrapper(**arguments: Any) -> None:
            given = {group: _pop_given(arguments, options) for group, options in groups.items()}
            command(**arguments, **given)

        generated = [option for options in groups.values() for option in options.values()]
        wrapper.__signature__ = inspect.Signature([*generated, *command_parameters])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in (*generated, *command_parameters)}
        return wrapper

    return decorate


def _pop_given(arguments: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the options of one model from `arguments`, and return those that the user gave."""
    values = {name: arguments.pop(name) for name in options}
    return {name: value for name, value in values.items() if value not in (None, [])}


def _options_of(model: type[BaseModel], only: Sequence[str]) -> Iterator[tuple[str, inspect.Parameter]]:
    for name, field in model.model_fields.items():
        is_hidden = any(isinstance(item, Option) and item.hidden for item in field.metadata)
        if not isinstance(field.default, BaseModel) and not is_hidden and (not only or name in only):
            yield name, _parameter(name, field)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    metadata = [*field.metadata, *_nested_metadata(field.annotation)]
    special = next((item for item in metadata if isinstance(item, Option)), Option())
    value_type = special.type or _plain_type(field.annotation)
    flag = special.flag or f"--{name.replace('_', '-')}"
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if value_type is bool else flag,
        help=_help(field, "," if special.type is str else " "),
        metavar=special.metavar,
        envvar=special.envvar,
        show_default=False,  # the default here is always None, meaning "not given"
        **_bounds(metadata, value_type),
    )
    annotation = Annotated[value_type | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain_type(annotation: Any) -> Any:
    """Strip None and constraints; return `list[T]` for `tuple[T, ...]`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _plain_type(get_args(annotation)[0])
    if origin in (Union, UnionType):
        (kept,) = [part for part in get_args(annotation) if part is not type(None)]
        return _plain_type(kept)
    if origin is tuple and get_args(annotation)[-1] is Ellipsis:
        return list[_plain_type(get_args(annotation)[0])]  # type: ignore[misc]
    if origin is tuple:
        return tuple[tuple(_plain_type(part) for part in get_args(annotation))]  # type: ignore[misc]
    return annotation


def _nested_metadata(annotation: Any) -> Iterator[Any]:
    """Metadata of the parts of a union, as in `Annotated[int, Field(ge=2)] | None`."""
    for part in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ():
        if get_origin(part) is Annotated:
            for item in get_args(part)[1:]:
                yield from item.metadata if isinstance(item, FieldInfo) else [item]


def _help(field: FieldInfo, between: str) -> str:
    """The description as a sentence; what begins with a value (`auto: ...`) begins as it is written.

    `between` separates the values of a default.
    """
    text = field.description or ""
    is_value = text.partition(" ")[0].endswith(":")
    return f"{text if is_value else text[:1].upper() + text[1:]}.{_shown_default(field, between)}"


def _shown_default(field: FieldInfo, between: str) -> str:
    default = field.default
    if field.default_factory is not None or default in (None, "", ()) or default is False:
        return ""
    values = default if isinstance(default, tuple) else ["yes" if default is True else default]
    shown = between.join(map(str, values))
    return rf"  \[default: {shown}]"  # escaped, as Rich reads brackets as markup


def _bounds(metadata: Sequence[Any], value_type: Any) -> dict[str, Any]:
    """Inclusive bounds, which Typer shows and checks; pydantic checks the exclusive ones of floats."""
    if value_type not in (int, float):
        return {}
    bounds: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, annotated_types.Ge):
            bounds["min"] = item.ge
        elif isinstance(item, annotated_types.Gt) and value_type is int:
            bounds["min"] = item.gt + 1  # type: ignore[operator]
        elif isinstance(item, annotated_types.Le):
            bounds["max"] = item.le
        elif isinstance(item, annotated_types.Lt) and value_type is int:
            bounds["max"] = item.lt - 1  # type: ignore[operator]
    return bounds
