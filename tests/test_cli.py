import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from semmae import cli
from semmae.errors import SettingError
from semmae.stages.pretrain import PretrainOptions
from semmae.tests.world import World


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def complaint(self) -> str:
        """The last line on standard error."""
        return self.err.strip().splitlines()[-1]


Command = Callable[..., Outcome]


@pytest.fixture
def semmae(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Runs a command in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["semmae", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def assert_one_sentence(outcome: Outcome, *words: str) -> None:
    assert outcome.code != 0
    assert "Traceback" not in outcome.err
    assert outcome.complaint.startswith("semmae: ")
    for word in words:
        assert word in outcome.complaint


def test_cli__arrow_gives_memory_back_unless_told_otherwise(
    semmae: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, wanted in ((None, "system"), ("mimalloc", "mimalloc")):
        monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", given or "")
        if given is None:
            monkeypatch.delenv("ARROW_DEFAULT_MEMORY_POOL")
        assert semmae("--help").code == 0
        assert os.environ["ARROW_DEFAULT_MEMORY_POOL"] == wanted


def test_cli__every_command_has_help(semmae: Command) -> None:
    for table in cli.COMMANDS:
        outcome = semmae(*table.split("."), "--help")
        assert outcome.code == 0
        assert "--dry-run" in outcome.out


def test_cli__every_option_says_what_it_is() -> None:
    for registered in cli.COMMANDS.values():
        for name, (_, text, _) in cli._fields(registered.options).items():
            assert text.endswith("."), f"{registered.options.__name__}.{name}"


def test_cli__help_does_not_wait_for_torch() -> None:
    import subprocess

    code = (
        "import sys; sys.argv = ['semmae', 'stage1', '--help']\n"
        "import semmae.cli\n"
        "try: semmae.cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_cli__missing_path_is_one_sentence(semmae: Command, tmp_path: Path) -> None:
    outcome = semmae(
        "stage2", "pretrain", "--data", "nowhere", "--masking", "random", "--output", "run"
    )
    assert_one_sentence(outcome, "nowhere")
    assert not (tmp_path / "run").exists()


def test_cli__empty_folder_is_one_sentence(semmae: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = semmae("stage1", "learn-parts", "--data", "empty", "--encoder", "x", "--output", "o")
    assert_one_sentence(outcome, "empty")


def test_cli__unknown_encoder_is_one_sentence(semmae: Command, world: World) -> None:
    learn = ("stage1", "learn-parts", "--data", world.data, "--output", "out", "--encoder")
    assert_one_sentence(semmae(*learn, "timm:vit_enormous"), "vit_enormous")
    assert_one_sentence(semmae(*learn, "no/such/file.pth"), "no/such/file.pth")


def test_cli__store_that_is_none_is_one_sentence(semmae: Command, world: World) -> None:
    pretrain = ("stage2", "pretrain", "--data", world.data, "--output", "run", "--parts")
    assert_one_sentence(semmae(*pretrain, world.encoder), "no part store")


def test_cli__export_says_how_its_file_is_loaded(
    semmae: Command, world: World, tmp_path: Path
) -> None:
    outcome = semmae("export", "--checkpoint", world.encoder, "--output", "out")
    assert outcome.code == 0
    assert outcome.out == (
        'wrote out: timm.create_model("local-dir:out", pretrained=True) makes it\n'
    )
    nothing = semmae("export", "--checkpoint", "nowhere", "--output", "other")
    assert_one_sentence(nothing, "nowhere", "a weight file or the folder of a run")
    unknown = semmae("export", "--checkpoint", world.encoder, "--output", "o", "--format", "onnx")
    assert unknown.code != 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]


def test_cli__too_many_workers_are_one_sentence(semmae: Command, world: World) -> None:
    outcome = semmae(
        *("stage1", "extract-parts", "--data", world.data, "--learner", world.learner),
        *("--output", "store", "--workers", "640"),
    )
    assert_one_sentence(outcome, "--workers is 640", "CPU")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_cli__an_interrupted_command_says_how_to_go_on(
    number: signal.Signals, semmae: Command, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semmae.stages import pretrain

    def interrupted(*arguments: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)  # until the signal comes

    monkeypatch.setattr(pretrain, "fit", interrupted)
    # A shell has its background jobs ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        outcome = semmae(
            *("stage2", "pretrain", "--data", world.data, "--masking", "random", "--output", "run")
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.code == 128 + number
    assert_one_sentence(outcome, f"interrupted ({number.name}); run holds no checkpoint yet")
    assert signal.getsignal(signal.SIGTERM) is terminated


class OutOfMemoryError(RuntimeError):
    """torch's own has this name."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3.2 TiB"),
        OutOfMemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_cli__memory_that_runs_out_is_one_sentence(
    error: Exception, semmae: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semmae.stages import make_creatures

    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(make_creatures, "make_creatures", full)
    outcome = semmae("data", "make-creatures", "--output", "creatures")
    assert_one_sentence(outcome, "memory ran out", "fewer workers")


def test_cli__faults_of_the_program_are_no_sentence(
    semmae: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from semmae.stages import make_creatures

    def broken(*arguments: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(make_creatures, "make_creatures", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        semmae("data", "make-creatures", "--output", "creatures")


def test_cli__too_many_workers_leave_no_half_made_store(
    semmae: Command, world: World, tmp_path: Path
) -> None:
    semmae(
        *("stage1", "extract-parts", "--data", world.data, "--learner", world.learner),
        *("--output", "store", "--workers", "640"),
    )
    assert not (tmp_path / "store").exists()


def test_cli__missing_flags_are_named(semmae: Command) -> None:
    assert_one_sentence(semmae("stage1", "extract-parts"), "--data", "--learner", "--output")


def test_cli__dry_run_prints_the_configuration_and_writes_nothing(
    semmae: Command, tmp_path: Path
) -> None:
    outcome = semmae(
        *("stage2", "pretrain", "--data", "d", "--output", "run", "--gamma", "3", "--dry-run")
    )
    assert outcome.code == 0
    for field in fields(PretrainOptions):
        assert f"  {field.name} = " in outcome.err
    assert "  gamma = 3.0" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--batch-size", "--effective-batch"])
def test_cli__the_batch_of_an_optimiser_step_has_two_names(semmae: Command, flag: str) -> None:
    given = ("--data", "d", "--output", "run", "--micro-batch", "8", flag, "48", "--dry-run")
    assert "  batch_size = 48" in semmae("stage2", "pretrain", *given).err
    # Where no batch is computed in parts there is one name.
    assert flag in semmae("stage1", "learn-parts", "--help").out
    assert (flag in semmae("eval", "linear", "--help").out) == (flag == "--batch-size")


def test_settings__flag_over_table_over_shared(semmae: Command, tmp_path: Path) -> None:
    (tmp_path / "semmae.toml").write_text(
        '[shared]\ndata = "here"\nseed = 1\n[stage2.pretrain]\noutput = "run"\n'
        "seed = 2\ngamma = 3\nbatch-size = 8\n"
    )
    resolved = semmae("stage2", "pretrain", "--batch-size", "16", "--dry-run").err
    assert "data = here" in resolved
    assert "seed = 2" in resolved
    assert "gamma = 3.0" in resolved
    assert "batch_size = 16" in resolved


def test_settings__the_batch_of_an_optimiser_step_has_two_names(
    semmae: Command, tmp_path: Path
) -> None:
    place = tmp_path / "semmae.toml"
    given = ("stage2", "pretrain", "--data", "d", "--output", "run", "--dry-run")
    place.write_text("[stage2.pretrain]\neffective-batch = 48\n")
    assert "  batch_size = 48" in semmae(*given).err
    place.write_text("[stage2.pretrain]\neffective-batch = 48\nbatch-size = 48\n")
    assert_one_sentence(semmae(*given), "says batch_size twice")
    place.write_text("[eval.linear]\neffective-batch = 48\n")
    assert_one_sentence(semmae(*given), "[eval.linear] has no key effective_batch")


def test_settings__a_number_is_taken_as_text_where_text_is_wanted(
    semmae: Command, tmp_path: Path
) -> None:
    (tmp_path / "semmae.toml").write_text("[stage2.pretrain]\ndata = 224\n")
    outcome = semmae("stage2", "pretrain", "--output", "run", "--dry-run")
    assert outcome.code == 0
    assert "  data = 224" in outcome.err
    assert cli._typed(str, 224, "here") == "224"
    for other in (True, 2.5, [224]):
        with pytest.raises(SettingError, match=r"here is .*: expected str"):
            cli._typed(str, other, "here")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[stage2.pretrain]\ngama = 3\n", ["[stage2.pretrain]", "gama"]),
        ("[stage2.pretrian]\ngamma = 3\n", ["stage2.pretrian"]),
        ("[stage3]\nx = 3\n", ["stage3.x"]),
        ("[stage3]\n", ["stage3"]),
        ('[shared]\nparts = "a"\n[stage1.extract-parts]\noutput = "b"\n', ["'a'", "'b'"]),
        ("gamma = 3\n", ["gamma", "[shared]"]),
        ("[shared]\ngamma = 3\n", ["[shared]", "gamma"]),
        ('[stage2.pretrain]\ngamma = "three"\n', ["gamma", "'three'", "float"]),
        ('[stage2.pretrain]\nmasking = "none"\n', ["masking", "semantic, random"]),
        ("[stage2.pretrain]\nbatch-size = 8\nbatch_size = 9\n", ["batch_size", "twice"]),
        ("[stage2.pretrain]\ngamma = \n", ["no valid TOML"]),
    ],
)
def test_settings__what_nothing_reads_is_named(
    semmae: Command, tmp_path: Path, text: str, words: list[str]
) -> None:
    (tmp_path / "semmae.toml").write_text(text)
    outcome = semmae("stage2", "pretrain", "--data", "d", "--output", "run", "--dry-run")
    assert_one_sentence(outcome, "semmae.toml", *words)


def test_init__its_file_runs_the_commands_as_they_stand(
    semmae: Command, world: World, tmp_path: Path
) -> None:
    assert semmae("init", "--data", world.data, "--encoder", world.encoder).code == 0
    text = (tmp_path / "semmae.toml").read_text()
    text = text.replace(
        "[stage2.pretrain]",
        '[stage2.pretrain]\nsize = "micro"\npatch-size = 8\nimage-size = 32\nepochs = 1\n'
        "warmup-epochs = 0",
    )
    text = text.replace("[stage1.learn-parts]", "[stage1.learn-parts]\nepochs = 1\nclusters = 12")
    (tmp_path / "semmae.toml").write_text(text)
    for command in (
        *("stage1 learn-parts", "stage1 extract-parts", "stage2 pretrain"),
        *("eval knn", "eval linear --epochs 2 --warmup-epochs 1", "parts show", "masks show"),
    ):
        outcome = semmae(*command.split())
        assert outcome.code == 0, outcome.err
    assert (tmp_path / "work" / "parts" / "complete.json").is_file()
    assert list((tmp_path / "work" / "run" / "checkpoints").iterdir())


def test_init__does_not_overwrite(semmae: Command, world: World) -> None:
    assert semmae("init", "--data", world.data).code == 0
    assert_one_sentence(semmae("init", "--data", world.data), "exists")
