"""The command line: parse, join flags with ``semmae.toml``, one call into `stages`.

Each command takes its flags from the fields of its options dataclass: name, type, default and help
stand there, once.  A value comes from the flag, else from the command's table in ``semmae.toml`` of
the working folder, else from the table ``[shared]`` there, else from the dataclass.
"""

import dataclasses
import functools
import inspect
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from . import __version__
from .errors import MissingError, SettingError, UserError
from .stages.demo import DemoOptions, demo
from .stages.evals.history import rerun, results_table
from .stages.evals.knn import KnnOptions, knn
from .stages.evals.linear import LinearOptions, linear
from .stages.evals.parts import PartsOptions, evaluate_parts
from .stages.extract_parts import ExtractPartsOptions, extract_parts
from .stages.initialise import InitialiseOptions, initialise
from .stages.learn_parts import LearnPartsOptions, learn_parts
from .stages.make_creatures import MakeCreaturesOptions, make_creatures
from .stages.pretrain import PretrainOptions, pretrain
from .stages.show import (
    ShowMasksOptions,
    ShowPartsOptions,
    ShowReconstructionsOptions,
    parts_info,
    show_masks,
    show_parts,
    show_reconstructions,
)

SETTINGS_FILE = Path("semmae.toml")

app = typer.Typer(
    help="SemMAE: learn semantic parts, then pretrain a masked autoencoder on them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
groups = {
    name: typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)
    for name, text in {
        "data": "Make images.",
        "stage1": "Learn parts and extract them into a store.",
        "stage2": "Pretrain with masks that follow the parts.",
        "eval": "Evaluate stored checkpoints and part stores.",
        "parts": "Look at a part store.",
        "masks": "Look at masks.",
    }.items()
}
for _name, _group in groups.items():
    app.add_typer(_group, name=_name)

COMMANDS: dict[str, type] = {}
"""Options class of each command that reads ``semmae.toml``, by its name there."""


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Say the version.")] = False,
) -> None:
    if version:
        print(f"semmae {__version__}")
        raise typer.Exit


def _fields(options: type) -> dict[str, tuple[Any, str, Any]]:
    """Type, help and default of each field of an options class; required ones first."""
    hints = typing.get_type_hints(options, include_extras=True)
    found = {}
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        kind, text = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, "")
        found[field.name] = (kind, text, field.default)
    required = {k: v for k, v in found.items() if v[2] is dataclasses.MISSING}
    return {**required, **found}


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (types.UnionType, typing.Union):
        return next(k for k in get_args(kind) if k is not type(None))
    return kind


def _parameter(name: str, kind: Any, text: str, default: Any, required: bool) -> inspect.Parameter:
    """One flag.  Its own default is None, which says that it was not given."""
    kind = _without_none(kind)
    flag = "--" + name.replace("_", "-")
    flags = f"{flag}/--no-{name.replace('_', '-')}" if kind is bool else flag
    shown = "required" if required else f"default: {default}"
    if default is None:
        shown = ""
    option = typer.Option(flags, help=f"{text} [{shown}]" if shown else text, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def command(path: str, options: type, arguments: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """Register a function of an options dataclass as the command of that path.

    Args:
        path: Such as ``"stage1 extract-parts"``.
        options: The dataclass whose fields are the flags.
        arguments: Fields that are given by place instead of by flag.
    """
    group, _, name = path.rpartition(" ")
    COMMANDS[path.replace(" ", ".")] = options

    def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(run)
        def body(**given: Any) -> None:
            dry = given.pop("dry_run")
            resolved = resolve(path.replace(" ", "."), options, given)
            _print_configuration(path, resolved)
            if not dry:
                run(resolved)

        parameters = []
        for field, (kind, text, default) in _fields(options).items():
            required = default is dataclasses.MISSING
            parameter = _parameter(field, kind, text, default, required)
            if field in arguments:
                place = typer.Argument(help=text, show_default=False)
                kind = _without_none(kind)
                parameter = parameter.replace(annotation=Annotated[kind | None, place])
            parameters.append(parameter)
        dry_run = typer.Option("--dry-run", help="Print the configuration and stop.")
        parameters.append(
            inspect.Parameter(
                "dry_run",
                inspect.Parameter.KEYWORD_ONLY,
                default=False,
                annotation=Annotated[bool, dry_run],
            )
        )
        body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        del body.__wrapped__  # type: ignore[attr-defined]
        (groups[group] if group else app).command(name, help=run.__doc__)(body)
        return run

    return register


def read_settings(path: Path = SETTINGS_FILE) -> dict[str, Any]:
    """The tables of ``semmae.toml``, flat: ``{"shared": {...}, "stage1.learn-parts": {...}}``.

    Raises:
        SettingError: The file is no TOML, or has a table or key that nothing reads.
    """
    if not path.exists():
        return {}
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is no valid TOML: {error}") from error
    tables = _flattened(content)
    every = {field for options in COMMANDS.values() for field in _fields(options)}
    for table, values in tables.items():
        if table != "shared" and table not in COMMANDS:
            known = ", ".join(sorted(COMMANDS))
            raise SettingError(f"{path}: unknown table [{table}]; expected [shared] or {known}")
        fields = every if table == "shared" else set(_fields(COMMANDS[table]))
        unknown = sorted(key for key in values if key.replace("-", "_") not in fields)
        if unknown:
            raise SettingError(f"{path}: [{table}] has no key {', '.join(unknown)}")
        spelt = [key.replace("-", "_") for key in values]
        doubled = sorted({key for key in spelt if spelt.count(key) > 1})
        if doubled:
            raise SettingError(f"{path}: [{table}] says {', '.join(doubled)} twice, with - and _")
    return tables


def _flattened(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    loose = [key for key, value in content.items() if not isinstance(value, dict)]
    if loose:
        raise SettingError(
            f"{SETTINGS_FILE}: {', '.join(loose)} stands outside a table; put it under [shared]"
        )
    for name, value in content.items():
        if name == "shared" or f"{name}" in COMMANDS:
            tables[name] = value
            continue
        loose = [key for key, inner in value.items() if not isinstance(inner, dict)]
        if loose:
            raise SettingError(f"{SETTINGS_FILE}: [{name}] has no key {', '.join(loose)}")
        tables.update({f"{name}.{inner}": values for inner, values in value.items()})
    return tables


def resolve(table: str, options: type, given: Mapping[str, Any]) -> Any:
    """The options of a command from flags, ``semmae.toml`` and defaults.

    Raises:
        SettingError: Something required is missing, or a value has the wrong type.
    """
    tables = read_settings()
    fields = _fields(options)
    values: dict[str, Any] = {}
    for source in ("shared", table):
        for key, value in tables.get(source, {}).items():
            name = key.replace("-", "_")
            if name in fields:
                values[name] = _typed(fields[name][0], value, f"{SETTINGS_FILE}: [{source}] {key}")
    values.update({name: value for name, value in given.items() if value is not None})
    missing = [
        name
        for name, (_, _, default) in fields.items()
        if default is dataclasses.MISSING and name not in values
    ]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise SettingError(
            f"{table.replace('.', ' ')} needs {flags}: give it as a flag, or under [{table}] or "
            f"[shared] in {SETTINGS_FILE} (`semmae init` writes one)"
        )
    return options(**values)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A TOML value as the field's type."""
    kind = _without_none(kind)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise SettingError(f"{where} is {value!r}: expected one of {', '.join(get_args(kind))}")
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SettingError(f"{where} is {value!r}: expected {kind.__name__}")
    return value


def _print_configuration(path: str, options: Any) -> None:
    """The resolved configuration, on standard error."""
    print(f"semmae {path}", file=sys.stderr)
    for field in dataclasses.fields(options):
        print(f"  {field.name} = {getattr(options, field.name)}", file=sys.stderr)


def _print_metrics(metrics: Mapping[str, Any]) -> None:
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(
            f"{name:{width}}  {value:.2f}"
            if isinstance(value, float)
            else f"{name:{width}}  {value}"
        )


@command("init", InitialiseOptions)
def _init(options: InitialiseOptions) -> None:
    """Write a commented semmae.toml for a data set."""
    print(f"wrote {initialise(options)}: edit it, then run the commands it names")


@command("demo", DemoOptions)
def _demo(options: DemoOptions) -> None:
    """The whole path on generated images, on a CPU, in minutes."""
    demo(options)


@command("data make-creatures", MakeCreaturesOptions)
def _make_creatures(options: MakeCreaturesOptions) -> None:
    """Generated images of animals with true part labels."""
    make_creatures(options)
    print(f"wrote {options.output}/images and {options.output}/labels")


@command("stage1 learn-parts", LearnPartsOptions)
def _learn_parts(options: LearnPartsOptions) -> None:
    """Learn parts on a frozen encoder."""
    learn_parts(options)
    print(
        f"wrote the part learner {options.output}; pictures of parts in {options.output}/pictures"
    )


@command("stage1 extract-parts", ExtractPartsOptions)
def _extract_parts(options: ExtractPartsOptions) -> None:
    """Run a trained part learner over a data set into a part store."""
    record = extract_parts(options)
    print(f"wrote the part store {options.output}: {record['ok']} images, {record['bad']} bad")


@command("stage2 pretrain", PretrainOptions)
def _pretrain(options: PretrainOptions) -> None:
    """Pretrain a masked autoencoder with semantic-guided masks."""
    print(f"wrote {pretrain(options)}")


@command("stage2 show", ShowReconstructionsOptions, arguments=("run",))
def _show(options: ShowReconstructionsOptions) -> None:
    """Draw what a pretraining run makes of masked images."""
    print(f"wrote {show_reconstructions(options)}")


@command("eval knn", KnnOptions)
def _knn(options: KnnOptions) -> None:
    """Classify by the nearest neighbours among the training images."""
    _print_metrics(knn(options))


@command("eval linear", LinearOptions)
def _linear(options: LinearOptions) -> None:
    """Train a linear classifier on frozen features."""
    _print_metrics(linear(options))


@command("eval parts", PartsOptions)
def _parts(options: PartsOptions) -> None:
    """Measure the parts of a store, against true labels where there are any."""
    _print_metrics(evaluate_parts(options))


@groups["eval"].command("rerun")
def _rerun(results: Annotated[Path, typer.Argument(help="Results folder.")]) -> None:
    """Run every evaluation on record again and print old beside new."""
    table = rerun(results)
    print(table.to_string(index=False, float_format="%.2f"))
    if table["new"].isna().any():
        raise MissingError(f"some evaluations in {results} could not be run again: see the notes")


@groups["eval"].command("table")
def _table(results: Annotated[Path, typer.Argument(help="Results folder.")]) -> None:
    """Print the results on record."""
    print(results_table(results).to_string(index=False, float_format="%.2f"))


@groups["parts"].command("info")
def _info(store: Annotated[Path, typer.Argument(help="Part store.")]) -> None:
    """Say what a part store holds."""
    _print_metrics(parts_info(store))


@command("parts show", ShowPartsOptions, arguments=("parts",))
def _show_parts(options: ShowPartsOptions) -> None:
    """Draw images of a store under the colours of their parts."""
    print(f"wrote {show_parts(options)}")


@command("masks show", ShowMasksOptions, arguments=("parts",))
def _show_masks(options: ShowMasksOptions) -> None:
    """Draw the masks of every policy at points of the schedule."""
    print(f"wrote {show_masks(options)}")


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 1, never a traceback."""
    try:
        app()
    except UserError as error:
        print(f"semmae: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("semmae: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
