"""Extraction killed again and again at random: `make soak`.

Drivers, actors and Ray's own processes die by SIGKILL at random moments, the command is run again
each time, and every store that comes out must be that of an undisturbed run, to the byte.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from semmae.stages.learn_parts import LearnPartsOptions, learn_parts
from semmae.stages.make_creatures import MakeCreaturesOptions, make_creatures
from semmae.stages.store_care import verify_parts
from semmae.tests.world import lasting_bytes

IMAGES = 480
MOST_FAILURES = 3
"""Runs in a row that may fail though nothing was killed; none should, and no more would mend it."""

ORPHAN_SECONDS = 60
"""Longer than workers outlive their driver; what they left goes when the command is run again."""

ENCODER = Path(__file__).parent.parent / "stages" / "creature_encoder.safetensors"


def prepare(work: Path) -> list[str]:
    """Images, bad ones among them, and a learner; the command without output and workers."""
    images = MakeCreaturesOptions(output=work / "c", train=IMAGES, val=0, size=64, seed=5)
    make_creatures(images)
    files = sorted((work / "c" / "images" / "train").rglob("*.png"))
    for number in (5, 100, 101, 300):
        files[number].write_bytes(files[number].read_bytes()[:200])
    learn_parts(
        LearnPartsOptions(
            data=str(work / "c" / "images"),
            encoder=str(ENCODER),
            output=work / "learner",
            variant="grid",
            sample_images=64,
        )
    )
    program = [sys.executable, "-c", "from semmae.cli import main; main()", "stage1"]
    data = ["--data", str(work / "c" / "images"), "--learner", str(work / "learner")]
    return [*program, "extract-parts", *data, "--class-attention", "--cache-images", "48"]


def children() -> dict[int, list[int]]:
    """Processes by parent."""
    found: dict[int, list[int]] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            found.setdefault(parent, []).append(int(place.name))
    return found


def family(root: int) -> list[int]:
    """A process and all that descend from it."""
    tree, found = children(), [root]
    for process in found:
        found += tree.get(process, [])
    return found


def name_of(process: int) -> str:
    try:
        words = (Path("/proc") / str(process) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return "gone"
    return Path(words[0].decode(errors="replace").split(" ")[0]).name or "?"


def kill(process: int) -> bool:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def soak(kills: int, seed: int, work: Path) -> None:
    draw = random.Random(seed)
    command = prepare(work)
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(output: Path, workers: int) -> subprocess.Popen[bytes]:
        full = [*command, "--output", str(output), "--workers", str(workers)]
        with (work / "log").open("ab") as log:
            return subprocess.Popen(full, stdout=log, stderr=log, env=quiet)

    began = time.monotonic()
    whole = work / "whole"
    assert start(whole, 0).wait() == 0
    expected = lasting_bytes(whole)
    usual = time.monotonic() - began
    print(f"undisturbed: {usual:.0f} s, {len(expected)} files", flush=True)
    done, stores, killed, failures = 0, 0, dict[str, int](), 0
    store = work / "store"
    while done < kills or store.exists():
        workers, before = draw.choice([0, 2]), done
        run = start(store, workers)
        while run.poll() is None:
            # Past the count, the last store is left to end.
            wait = draw.uniform(0, (1 if workers == 0 else 3) * usual) if done < kills else 3600
            try:
                run.wait(wait)
            except subprocess.TimeoutExpired:
                victim = draw.choice([run.pid, *family(run.pid)])
                name = "driver" if victim == run.pid else name_of(victim)
                if kill(victim):
                    done += 1
                    killed[name] = killed.get(name, 0) + 1
                    print(f"kill {done}: {name}, {workers} workers", flush=True)
        told = (work / "log").read_text(errors="replace")
        assert "Traceback" not in told, told[told.index("Traceback") :][:3000]
        failures = failures + 1 if run.returncode and done == before else 0
        assert failures < MOST_FAILURES, f"{failures} runs failed, undisturbed:\n{told[-3000:]}"
        if run.returncode == 0:
            assert verify_parts(store) == [], "a store that was completed is damaged"
            if lasting_bytes(store) != expected:  # workers that outlived a driver may end later
                time.sleep(ORPHAN_SECONDS)
                assert start(store, 0).wait() == 0
            assert lasting_bytes(store) == expected
            stores += 1
            shutil.rmtree(store)
            print(f"store {stores} is that of the undisturbed run, to the byte", flush=True)
    print(f"{done} kills ({killed}), {stores} stores, each to the byte: {seed=}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="semmae-soak-") as folder:
        soak(given.kills, given.seed, Path(folder))


if __name__ == "__main__":
    main()
