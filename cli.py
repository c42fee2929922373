"""The command line: parse, join flags with ``semmae.toml``, one call into `stages`.

Each command takes its flags from the fields of its options dataclass: name, type, default and help
stand there, once.  A value comes from the flag, else from the command's table in ``semmae.toml`` of
the working folder, else from the table ``[shared]`` there, else from the dataclass.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import os
import signal
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import typer.core
import typer.main

from . import __version__
from .errors import (
    DamageError,
    MismatchError,
    MissingError,
    SettingError,
    UserError,
    ran_out_of_memory,
)
from .storage.store_paths import StorePath, store_path

if typing.TYPE_CHECKING:
    from .stages.demo import DemoOptions
    from .stages.evals.knn import KnnOptions
    from .stages.evals.linear import LinearOptions
    from .stages.evals.parts import PartsOptions
    from .stages.export import ExportOptions
    from .stages.extract_parts import ExtractPartsOptions
    from .stages.import_parts import ImportPartsOptions
    from .stages.initialise import InitialiseOptions
    from .stages.learn_encoder import LearnEncoderOptions
    from .stages.learn_parts import LearnPartsOptions
    from .stages.make_creatures import MakeCreaturesOptions
    from .stages.pretrain import PretrainOptions
    from .stages.replay import ReplayOptions
    from .stages.show import ShowMasksOptions, ShowPartsOptions, ShowReconstructionsOptions
    from .stages.store_care import RepairPartsOptions

SETTINGS_FILE = Path("semmae.toml")

SHARED_KEYS = ("data", "encoder", "learner", "parts", "device", "seed")
"""What ``[shared]`` may say; each command takes those that it has."""


WRITTEN_BY = {"learner": "stage1.learn-parts", "parts": "stage1.extract-parts"}
"""Shared keys that name the output of a command."""


@dataclasses.dataclass(frozen=True)
class _Registered:
    """A command: where its options dataclass is, and what it does with them."""

    options_at: str
    run: Callable[[Any], None]
    arguments: tuple[str, ...]
    forecast_at: str

    @functools.cached_property
    def options(self) -> type:
        found: type = _stage(self.options_at)
        return found

    def forecast(self, options: Any) -> None:
        """Print what the command would do, where it can say more than its configuration."""
        if self.forecast_at:
            _print_metrics(_stage(self.forecast_at)(options))


def _stage(place: str) -> Any:
    """What stands in `stages` at ``"module:name"``."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f".stages.{module}", __package__), name)


COMMANDS: dict[str, _Registered] = {}
"""Commands that take an options dataclass, by their table in ``semmae.toml``."""


class _LazyGroup(typer.core.TyperGroup):
    """Builds a command's flags when it is called, so that help does not wait for torch."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        table = f"{name}" if ctx.parent is None else f"{self.name}.{name}"
        if table in COMMANDS:
            found = _with_flags(table, COMMANDS[table])
        return name, found, rest


def _typer(text: str) -> typer.Typer:
    return typer.Typer(
        cls=_LazyGroup,
        help=text,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        add_completion=False,
    )


app = _typer("SemMAE: learn semantic parts, then pretrain a masked autoencoder on them.")
groups = {
    name: _typer(text)
    for name, text in {
        "data": "Make images.",
        "stage1": "Learn parts and extract them into a store.",
        "stage2": "Pretrain with masks that follow the parts.",
        "eval": "Evaluate stored checkpoints and part stores.",
        "parts": "Look at a part store, check and mend it, or make one from label images.",
        "masks": "Look at masks.",
    }.items()
}
for _name, _group in groups.items():
    app.add_typer(_group, name=_name)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"semmae {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version.", callback=_say_version)
    ] = False,
) -> None:
    pass


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
        kinds = tuple(k for k in get_args(kind) if k is not type(None))
        if str in kinds:  # such as a size, which may be 224 or 224x320
            return str
        return typing.Union[kinds]  # noqa: UP007, of one kind it is that kind
    return kind


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_place(kind: Any) -> bool:
    """Whether a field is a path, or where a store may lie."""
    return kind in (Path, StorePath)


def _parameter(name: str, kind: Any, text: str, default: Any, *also: str) -> inspect.Parameter:
    """One flag, and its other names.  Its default is None, which says that it was not given."""
    kind = _without_none(kind)
    flag = _flag(name)
    flags = f"{flag}/--no-{name.replace('_', '-')}" if kind is bool else flag
    if default is dataclasses.MISSING:
        text += " [required]"
    elif default is not None:
        text += f" [default: {default}]"
    place = _is_place(kind)
    # As text: a path would make one slash of the two of a URL.
    metavar = "PATH" if place else None
    option = typer.Option(flags, *also, help=text, show_default=False, metavar=metavar)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[(str if place else kind) | None, option],
    )


def command(
    path: str, options_at: str, arguments: tuple[str, ...] = (), forecast_at: str = ""
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function of an options dataclass as the command of that path.

    Args:
        path: Such as ``"stage1 extract-parts"``.
        options_at: Module under `stages` and dataclass, ``"module:Class"``; its fields are the
            flags.
        arguments: Fields that are given by place instead of by flag.
        forecast_at: Module under `stages` and function that says of options what the command would
            do; for ``--dry-run``.
    """
    group, _, name = path.rpartition(" ")

    def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
        COMMANDS[path.replace(" ", ".")] = _Registered(options_at, run, arguments, forecast_at)
        (groups[group] if group else app).command(name, help=run.__doc__)(lambda: None)
        return run

    return register


def _with_flags(table: str, registered: _Registered) -> Any:
    """The command with a flag for each field of its options."""

    def body(**given: Any) -> None:
        dry = given.pop("dry_run")
        resolved = resolve(table, registered.options, given)
        _print_configuration(table, resolved)
        if dry:
            registered.forecast(resolved)
            return
        heard = sys.stdout if _speaks() else None
        with _interruptible(resolved), contextlib.redirect_stdout(heard):
            registered.run(resolved)

    parameters, fields = [], _fields(registered.options)
    for field, (kind, text, default) in fields.items():
        also = [_flag(name) for name, of in _aliases(fields).items() if of == field]
        parameter = _parameter(field, kind, text, default, *also)
        if field in registered.arguments:
            place = typer.Argument(help=text, show_default=False)
            parameter = parameter.replace(annotation=Annotated[str | None, place])
        parameters.append(parameter)
    dry_run = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and stop.")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("dry_run", keyword, default=False, annotation=dry_run))
    body.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(table.rpartition(".")[2], help=registered.run.__doc__)(body)
    return typer.main.get_command(alone)


@contextlib.contextmanager
def _interruptible(options: Any) -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM, as batch systems send it, end a command in one sentence."""
    ended: list[int] = []

    def end(number: int, frame: object) -> None:
        ended.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # launchers say it more than once
        # Batch systems send it to loader workers too, and torch would raise that they are gone.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        raise KeyboardInterrupt  # what Ray makes of anything that a handler raises

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        number = signal.SIGTERM if ended else signal.SIGINT
        if _speaks():
            told = f"semmae: interrupted ({number.name}); {_going_on(options)}"
            print(told, file=sys.stderr)
        raise typer.Exit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _going_on(options: Any) -> str:
    """What becomes of a command that is cut off, where it is given once more."""
    if not hasattr(options, "checkpoint_steps"):  # its output is no run
        return "the same command goes on where it can"
    from .storage.checkpoints import checkpoints, newest_checkpoints  # torch takes seconds to load

    # Of runs that a run is made from, those that come later in the alphabet come later.
    found = [path for _, path in checkpoints(options.output)] or newest_checkpoints(options.output)
    if not found:
        return f"{options.output} holds no checkpoint yet, the same command begins anew"
    auto = "" if options.resume == "auto" else " with --resume auto"
    return f"the same command goes on{auto} from {found[-1]}"


def _aliases(fields: Collection[str]) -> dict[str, str]:
    """Other names of some fields."""
    # What an optimiser step sees, in all parts and processes that it is computed in.
    return {"effective_batch": "batch_size"} if "micro_batch" in fields else {}


def _field_of(key: str, fields: Collection[str]) -> str:
    """The field that a key of a settings file names."""
    name = key.replace("-", "_")
    return _aliases(fields).get(name, name)


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
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}") from error
    tables = _flattened(content)
    for table, values in tables.items():
        fields = SHARED_KEYS if table == "shared" else tuple(_fields(COMMANDS[table].options))
        spelt = [_field_of(key, fields) for key in values]
        unknown = sorted(set(spelt) - set(fields))
        if unknown:
            known = ", ".join(field.replace("_", "-") for field in fields)
            raise SettingError(
                f"{path}: [{table}] has no key {', '.join(unknown)}; there are {known}"
            )
        doubled = sorted({key for key in spelt if spelt.count(key) > 1})
        if doubled:
            raise SettingError(
                f"{path}: [{table}] says {', '.join(doubled)} twice, in two spellings"
            )
    for key, table in WRITTEN_BY.items():
        read, written = tables.get("shared", {}).get(key), tables.get(table, {}).get("output")
        if read is not None and written is not None and read != written:
            raise SettingError(
                f"{path}: [shared] {key} = {read!r} contradicts [{table}] output = {written!r}: "
                "what one command writes there, the next reads; make them the same"
            )
    return tables


def _flattened(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tables by dotted name; refuses those that no command reads."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        if not isinstance(value, dict):
            raise SettingError(
                f"{SETTINGS_FILE}: {name} stands outside a table; put it under [shared]"
            )
        if name == "shared" or name in COMMANDS:
            tables[name] = value
            continue
        inner = {f"{name}.{key}": values for key, values in value.items()}
        unknown = [key for key in inner if key not in COMMANDS] or ([] if inner else [name])
        if unknown:
            known = ", ".join(sorted(COMMANDS))
            raise SettingError(
                f"{SETTINGS_FILE}: nothing reads {', '.join(unknown)}; expected tables for {known}"
            )
        tables.update(inner)
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
            name = _field_of(key, fields)
            if name in fields:
                values[name] = _typed(fields[name][0], value, f"{SETTINGS_FILE}: [{source}] {key}")
    for name, value in given.items():
        if value is not None:
            values[name] = _typed(fields[name][0], value, _flag(name))
    missing = [
        name
        for name, (_, _, default) in fields.items()
        if default is dataclasses.MISSING and name not in values
    ]
    if missing:
        flags = ", ".join(map(_flag, missing))
        raise SettingError(
            f"{table.replace('.', ' ')} needs {flags}: give it as a flag, or under [{table}] or "
            f"[shared] in {SETTINGS_FILE} (`semmae init` writes one)"
        )
    return options(**values)


def _typed(kind: Any, value: Any, where: str) -> Any:
    """A value of a flag or of TOML as the field's type."""
    kind = _without_none(kind)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise SettingError(f"{where} is {value!r}: expected one of {', '.join(get_args(kind))}")
        return value
    if _is_place(kind) and isinstance(value, str):
        place = store_path(value)
        if not isinstance(place, kind):
            raise SettingError(
                f"{where} is {value}: expected a path on this machine; images (--data) and part "
                "stores may lie behind a URL"
            )
        return place
    if kind in (float, str) and isinstance(value, int) and not isinstance(value, bool):
        return kind(value)  # a size is text, since it may be 224x320, but 224 needs no quotes
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SettingError(f"{where} is {value!r}: expected {kind.__name__}")
    return value


def _speaks() -> bool:
    """Whether this is the only process of the command, or the first of several (torchrun's)."""
    return os.environ.get("RANK", "0") == "0"


def _print_configuration(table: str, options: Any) -> None:
    """The resolved configuration, on standard error."""
    if not _speaks():
        return
    print(f"semmae {table.replace('.', ' ')}", file=sys.stderr)
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


@command("init", "initialise:InitialiseOptions")
def _init(options: "InitialiseOptions") -> None:
    """Write a commented semmae.toml for a data set."""
    from .stages.initialise import initialise

    print(f"wrote {initialise(options)}: edit it, then run the commands it names")


@command("demo", "demo:DemoOptions")
def _demo(options: "DemoOptions") -> None:
    """The whole path on generated images, on a CPU, in minutes."""
    from .stages.demo import demo

    demo(options)


@command("data make-creatures", "make_creatures:MakeCreaturesOptions")
def _make_creatures(options: "MakeCreaturesOptions") -> None:
    """Generated images of animals with true part labels."""
    from .stages.make_creatures import make_creatures

    make_creatures(options)
    print(f"wrote {options.output}/images and {options.output}/labels")


@command("stage1 learn-encoder", "learn_encoder:LearnEncoderOptions")
def _learn_encoder(options: "LearnEncoderOptions") -> None:
    """Learn a self-supervised encoder of one's own, without downloads."""
    from .stages.learn_encoder import learn_encoder

    learn_encoder(options)
    print(f"wrote the encoder {options.output}: give it as --encoder or --checkpoint")


@command("stage1 learn-parts", "learn_parts:LearnPartsOptions")
def _learn_parts(options: "LearnPartsOptions") -> None:
    """Learn parts on a frozen encoder."""
    from .stages.learn_parts import learn_parts

    learn_parts(options)
    print(
        f"wrote the part learner {options.output}; pictures of parts in {options.output}/pictures"
    )


@command(
    "stage1 extract-parts",
    "extract_parts:ExtractPartsOptions",
    forecast_at="extraction_forecast:forecast_extraction",
)
def _extract_parts(options: "ExtractPartsOptions") -> None:
    """Run a trained part learner over a data set into a part store."""
    from .stages.extract_parts import extract_parts

    record = extract_parts(options)
    print(f"wrote the part store {options.output}: {record['ok']} images, {record['bad']} bad")


@command("stage2 pretrain", "pretrain:PretrainOptions")
def _pretrain(options: "PretrainOptions") -> None:
    """Pretrain a masked autoencoder with semantic-guided masks."""
    from .stages.pretrain import pretrain

    print(f"wrote {pretrain(options)}")


@command("stage2 show", "show:ShowReconstructionsOptions", arguments=("run",))
def _show(options: "ShowReconstructionsOptions") -> None:
    """Draw what a pretraining run makes of masked images."""
    from .stages.show import show_reconstructions

    print(f"wrote {show_reconstructions(options)}")


@command("stage2 replay", "replay:ReplayOptions", arguments=("dump",))
def _replay(options: "ReplayOptions") -> None:
    """Compute a step again whose loss or gradients were not finite, from its dump."""
    from .stages.replay import replay

    _print_metrics(replay(options))


@command("export", "export:ExportOptions")
def _export(options: "ExportOptions") -> None:
    """Write a checkpoint as timm or MAE's own code loads it."""
    from .stages.export import export

    print(export(options))


@command("eval knn", "evals.knn:KnnOptions")
def _knn(options: "KnnOptions") -> None:
    """Classify by the nearest neighbours among the training images."""
    from .stages.evals.knn import knn

    _print_metrics(knn(options))


@command("eval linear", "evals.linear:LinearOptions")
def _linear(options: "LinearOptions") -> None:
    """Train a linear classifier on frozen features."""
    from .stages.evals.linear import linear

    _print_metrics(linear(options))


@command("eval parts", "evals.parts:PartsOptions")
def _parts(options: "PartsOptions") -> None:
    """Measure the parts of a learner or a store, baselines beside, against true labels if given."""
    from .stages.evals.parts import evaluate_parts

    _print_metrics(evaluate_parts(options))


@groups["eval"].command("rerun")
def _rerun(results: Annotated[Path, typer.Argument(help="Results folder.")]) -> None:
    """Run every evaluation on record again and print old beside new."""
    from .stages.evals.history import rerun

    table = rerun(results)
    print(table.to_string(index=False, float_format="%.2f"))
    if not table["measured"].all():
        raise MissingError(f"some evaluations in {results} could not be run again: see the notes")


@groups["eval"].command("table")
def _table(results: Annotated[Path, typer.Argument(help="Results folder.")]) -> None:
    """Print the results on record, and of part learners the means over seeds."""
    from .stages.evals.history import results_tables, seed_means
    from .stages.evals.seeds import shown_means

    for kind, table in results_tables(results).items():
        if kind != "parts":
            print(f"{kind}\n{table.to_string(index=False, float_format='%.2f')}\n")
            continue
        # More figures than a line has room for: a line each.
        print(f"{kind}\n{table.T.to_string(header=False, float_format='{:.2f}'.format)}\n")
        if not (means := seed_means(results)).empty:
            print("parts, mean ± standard deviation over seeds")
            print(f"{shown_means(means).T.to_string(header=False)}\n")


@groups["parts"].command("info")
def _info(store: Annotated[str, typer.Argument(help="Part store.")]) -> None:
    """Say what a part store holds."""
    from .stages.show import parts_info

    _print_metrics(parts_info(store_path(store)))


@groups["parts"].command("verify")
def _verify(
    store: Annotated[str, typer.Argument(help="Part store.")],
    data: Annotated[
        str | None, typer.Option(help="Also read its images there, and name those that changed.")
    ] = None,
) -> None:
    """Read every byte of a part store and name what is damaged, missing or foreign."""
    from .stages.image_check import changed_images
    from .stages.store_care import verify_parts

    path = store_path(store)
    faults, changed = verify_parts(path), 0
    for fault in faults:
        print(fault)
    if data and any(fault.name.startswith("plan") for fault in faults):
        print("without a sound plan the images are not compared", file=sys.stderr)
    elif data:
        for image in changed_images(path, data):
            print(image)
            changed += 1
    if faults and all(fault.foreign for fault in faults):
        raise DamageError(
            f"{len(faults)} files in {store} are not its own: remove them; all that is its own is "
            "as it was written"
        )
    if faults:
        raise DamageError(
            f"{len(faults)} objects of {store} are not as they were written: "
            f"`semmae parts repair {store}` mends what can be mended"
        )
    if changed:
        raise MismatchError(
            f"{changed} images in {data} are not those that {store} was made of: put those back, "
            f"or make a new store by `semmae stage1 extract-parts --update {store}`"
        )
    also = f", and its images are those in {data}" if data else ""
    print(f"{store} is what was written, to the byte{also}")


@command("parts repair", "store_care:RepairPartsOptions", arguments=("parts",))
def _repair(options: "RepairPartsOptions") -> None:
    """Do the damaged and missing shards of a part store again, and nothing else."""
    from .stages.store_care import repair_parts

    for fault in repair_parts(options):
        print(f"mended: {fault}")
    print(f"{options.parts} is what was written, to the byte")


@command("parts import", "import_parts:ImportPartsOptions")
def _import_parts(options: "ImportPartsOptions") -> None:
    """Make a part store from label images, such as true parts."""
    from .stages.import_parts import import_parts

    record = import_parts(options)
    print(f"wrote the part store {options.output}: {record['ok']} images, {record['bad']} bad")


@command("parts show", "show:ShowPartsOptions", arguments=("parts",))
def _show_parts(options: "ShowPartsOptions") -> None:
    """Draw images of a store under the colours of their parts."""
    from .stages.show import show_parts

    print(f"wrote {show_parts(options)}")


@command("masks show", "show:ShowMasksOptions", arguments=("parts",))
def _show_masks(options: "ShowMasksOptions") -> None:
    """Draw the masks of every policy at points of the schedule."""
    from .stages.show import show_masks

    print(f"wrote {show_masks(options)}")


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 1, never a traceback."""
    # Arrow's own allocators keep most of what is freed, so that memory grows with the plan.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    try:
        app()
    except UserError as error:
        print(f"semmae: {error}", file=sys.stderr)
        sys.exit(1)
    except (OSError, MemoryError, RuntimeError) as error:
        if ran_out_of_memory(error):
            print(
                "semmae: memory ran out: take smaller batches, fewer workers (the command's --help "
                "says by which flags) or a machine or GPU with more, and run the command again",
                file=sys.stderr,
            )
            sys.exit(1)
        if not isinstance(error, OSError):
            raise
        # A disk or mount that fails where nothing more can be said of it.
        place = f" {error.filename}" if error.filename else ""
        print(
            f"semmae: the system refused{place}: {error.strerror or error}; see whether the disk "
            "or mount is there, and run the command again",
            file=sys.stderr,
        )
        sys.exit(1)
