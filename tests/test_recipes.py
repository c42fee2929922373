import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from ray.autoscaler._private.util import prepare_config, validate_config

from semmae import cli
from semmae.stages import demo

RECIPES = Path(__file__).parent.parent / "recipes"
SCRIPTS = sorted(RECIPES.glob("*.sh"))

STUB = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0")" "$@" "" >> "$CALLS"
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_recipes__scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def calls_of(script: Path, folder: Path) -> list[list[str]]:
    """Words of each command that a script runs, given the arguments A, B and C."""
    for name in ("semmae", "torchrun", "python"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    found = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls)}
    subprocess.run(["bash", script, "A", "B", "C"], check=True, env=found)
    return [call.splitlines() for call in calls.read_text().rstrip("\n").split("\n\n")]


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if "slurm" not in s.name], ids=lambda path: path.name
)
def test_recipes__say_what_every_command_takes(
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = calls_of(script, tmp_path)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for program, *words in calls:
        if program == "python":
            continue
        words = words[words.index("semmae") + 1 :] if program == "torchrun" else words
        if words[:2] not in (["stage1", "extract-parts"],):  # its dry run looks at the images
            words.append("--dry-run")
        else:
            words.append("--help")
        monkeypatch.setattr(sys, "argv", ["semmae", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, capsys.readouterr().err
        ran += 1
    assert ran


def test_semmae_tiny_cpu__does_what_the_demo_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[object] = []
    for name, registered in list(cli.COMMANDS.items()):
        monkeypatch.setitem(cli.COMMANDS, name, replace(registered, run=ran.append))
    for _, *words in calls_of(RECIPES / "semmae_tiny_cpu.sh", tmp_path):
        monkeypatch.setattr(sys, "argv", ["semmae", *words])
        with pytest.raises(SystemExit):
            cli.main()
    does: list[object] = []
    for name in (
        *("make_creatures", "learn_parts", "extract_parts", "pretrain", "knn"),
        *("linear", "evaluate_parts", "show_parts", "show_masks", "_finish"),
    ):
        monkeypatch.setattr(demo, name, lambda options, *more: does.append(options))
    demo.demo(demo.DemoOptions(output=Path("A")))
    assert len(ran) == 5
    for given, wanted in zip(ran, does, strict=False):
        of_demo, of_recipe = vars(wanted), vars(given)
        assert type(given) is type(wanted)
        assert {
            name: value
            for name, value in of_recipe.items()
            if str(of_demo[name]) != str(value) and name != "encoder"
        } == {}


def test_ray_cluster__is_what_the_launcher_takes() -> None:
    cluster = yaml.safe_load((RECIPES / "ray-cluster.yaml").read_text())
    whole = prepare_config(cluster)
    validate_config(whole)
    assert whole["available_node_types"]["gpu"]["max_workers"] == cluster["max_workers"]
