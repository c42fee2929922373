"""Workers without Ray, on a Ray of this machine, and on a cluster that is there already."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from semmae.errors import MissingError, SettingError, UserError
from semmae.pipeline import ray_cluster, ray_shards, watching
from semmae.pipeline.cluster import open_workers
from semmae.pipeline.placement import Placement
from semmae.pipeline.shard_worker import OneBehind, Record, WorkerLostError
from semmae.pipeline.watching import HERE, Tell, Told

pytestmark = pytest.mark.xdist_group("ray")


class Fake:
    """A worker that computes nothing and says where it is."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    def __call__(self, shard: int, tell: Tell) -> dict[str, Any]:
        tell(shard + 1)
        time.sleep(self._seconds)
        return {"shard": shard, "gpus": ray.get_gpu_ids() if ray.is_initialized() else []}


class Refuses(Fake):
    def __call__(self, shard: int, tell: Tell) -> dict[str, Any]:
        raise SettingError("this is the user's to mend")


class Breaks(Fake):
    def __call__(self, shard: int, tell: Tell) -> dict[str, Any]:
        return {"share": 1 / (shard - shard)}


def cannot_be_made() -> Fake:
    raise MissingError("there is no learner here")


class FailsOnce(Fake):
    """A worker that fails at its first try of shard 2; leaves a note of the process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._mark = folder / "tried"

    def __call__(self, shard: int, tell: Tell) -> dict[str, Any]:
        if shard == 2 and not self._mark.exists():
            self._mark.write_text(str(os.getpid()))
            self.fail()
        return {**super().__call__(shard, tell), "process": os.getpid()}

    def fail(self) -> None:
        raise NotImplementedError


class Dies(FailsOnce):
    """It is killed."""

    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class WritesBehind(Fake):
    """A worker that is written to the end of its shards by a thread; killed once at shard 3."""

    def __init__(self, folder: Path, seconds: float) -> None:
        super().__init__()
        self._folder, self._pause = folder, seconds
        self._thread = ThreadPoolExecutor(1)

    def __call__(self, shard: int, tell: Tell) -> Future[Record]:  # type: ignore[override]
        mark = self._folder / "killed"
        if shard == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        record = super().__call__(shard, tell)
        return self._thread.submit(self._write, record)

    def _write(self, record: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self._pause)
        with (self._folder / "written").open("a") as file:
            file.write(f"{record['shard']}\n")
        return record


def test_map__without_workers_has_written_all_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "killed").touch()
    with open_workers(Placement(workers=0)) as workers:
        records = workers.map(lambda: WritesBehind(tmp_path, 0.05), [4, 3, 1])
        assert [record["shard"] for record in records] == [4, 3, 1]
    assert (tmp_path / "written").read_text().split() == ["4", "3", "1"]


def test_map__without_workers_runs_here_and_tells() -> None:
    told: list[Mapping[int, Told]] = []
    with open_workers(Placement(workers=0)) as workers:
        records = list(workers.map(Fake, [3, 1], told.append))
        assert workers.once(os.getpid) == os.getpid()
    assert [record["shard"] for record in records] == [3, 1]
    assert told == [{3: Told(4, HERE)}, {1: Told(2, HERE)}]


@pytest.mark.parametrize("workers", [0, 1])
def test_map__of_no_use_starts_no_ray(workers: int) -> None:
    with open_workers(Placement(workers=workers)) as there:
        assert there.device_type in ("cpu", "cuda")
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": 640, "device": "cpu"}, "--workers is 640, but this machine has"),
        ({"workers": 1, "device": "cuda"}, "has no GPU: use --device cpu"),
    ],
)
def test_open_workers__refuses_what_cannot_be_placed(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words), open_workers(Placement(**changes)):
        pass


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[str]:
    """A Ray that believes in four GPUs; its address."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_gpus=4, num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def joined(four_gpus: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of that Ray, which stays when the workers are left."""
    monkeypatch.setattr(ray_cluster.RayCluster, "_join", lambda self: None)
    monkeypatch.setattr(ray_cluster.RayCluster, "_leave", lambda self: None)
    return four_gpus


def run(
    placement: Placement, make: Callable[[], Any], shards: range
) -> tuple[list[dict[str, Any]], list[Mapping[int, Told]]]:
    told: list[Mapping[int, Told]] = []
    with open_workers(placement) as workers:
        return list(workers.map(make, shards, lambda now: told.append(dict(now)))), told


def test_map__each_actor_has_a_gpu_of_its_own(joined: str) -> None:
    placement = Placement(workers=4, address=joined)
    records, _ = run(placement, lambda: Fake(0.5), range(12))
    assert sorted(record["shard"] for record in records) == list(range(12))
    gpus = {record["worker"]: tuple(record["gpus"]) for record in records}
    assert sorted(gpus.values()) == [(0,), (1,), (2,), (3,)]


def test_map__several_actors_share_a_gpu(joined: str) -> None:
    placement = Placement(workers=5, workers_per_gpu=2, address=joined)
    records, _ = run(placement, lambda: Fake(1.0), range(20))
    gpus = {record["worker"]: tuple(record["gpus"]) for record in records}
    used = Counter(gpus.values())
    assert set(used) <= {(0,), (1,), (2,), (3,)}
    assert max(used.values()) == 2


def test_map__actors_on_processors_leave_gpus_alone(joined: str) -> None:
    placement = Placement(workers=2, address=joined, device="cpu")
    with open_workers(placement) as workers:
        assert workers.device_type == "cpu"
    records, _ = run(placement, Fake, range(4))
    assert all(record["gpus"] == [] for record in records)


def test_open_workers__more_than_the_cluster_has_are_refused(joined: str) -> None:
    with (
        pytest.raises(SettingError, match="4 GPUs, room for 4: expected at most 4; --workers-per"),
        open_workers(Placement(workers=5, address=joined)),
    ):
        pass


@pytest.fixture
def growing(joined: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes that Ray one that grows, as it says until the returned function says otherwise."""

    def grows(feasible: bool) -> None:
        def state() -> SimpleNamespace:
            groups = [] if feasible else ray.util.placement_group_table()
            refused = [SimpleNamespace(details=f"{group}:PACK|PENDING") for group in groups]
            return SimpleNamespace(infeasible_gang_resource_requests=refused)

        monkeypatch.setattr(ray_cluster, "_autoscaling_state", state)

    return grows


def test_open_workers__a_cluster_that_grows_is_waited_for(
    joined: str,
    growing: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    growing(True)
    # Two of its GPUs seem not to be there yet, and all are taken for a while.
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0, "CPU": 8.0})
    taken = ray.util.placement_group([{"GPU": 4}])
    assert taken.wait(10)
    threading.Timer(3, ray.util.remove_placement_group, [taken]).start()
    with open_workers(Placement(workers=4, address=joined)) as workers:
        assert workers.device_type == "cuda"
    assert f"waiting for {joined} to grow: room for 2 of 4 workers" in capsys.readouterr().err


def test_open_workers__more_than_a_cluster_can_grow_to_are_refused(
    joined: str, growing: Callable[[bool], None]
) -> None:
    growing(False)
    with (
        pytest.raises(SettingError, match=r"--workers is 5, but .* does not grow to room for as"),
        open_workers(Placement(workers=5, address=joined)),
    ):
        pass
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}


def test_refuse_hidden__a_path_that_a_node_lacks_is_named(joined: str, tmp_path: Path) -> None:
    (tmp_path / "seen").touch()
    with open_workers(Placement(workers=1, address=joined)) as workers:
        workers.refuse_hidden([tmp_path / "seen"])
        with pytest.raises(MissingError, match=f"hidden cannot be seen on {socket.gethostname()}"):
            workers.refuse_hidden([tmp_path / "seen", tmp_path / "hidden"])


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (Refuses, SettingError, "this is the user's to mend"),
        (cannot_be_made, MissingError, "there is no learner here"),
        (Breaks, RuntimeError, "ZeroDivisionError"),
    ],
)
def test_map__what_a_worker_raises_reaches_the_caller(
    joined: str, make: Callable[[], Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words) as raised:
        run(Placement(workers=1, address=joined), make, range(3))
    if issubclass(kind, UserError):
        assert str(raised.value).startswith(f"on {socket.gethostname()}: ")


def test_map__a_dead_worker_is_replaced(joined: str, tmp_path: Path) -> None:
    placement = Placement(workers=2, address=joined)
    records, _ = run(placement, lambda: Dies(tmp_path), range(6))
    assert sorted(record["shard"] for record in records) == list(range(6))


def test_map__what_a_dead_worker_was_still_writing_is_done_again(
    joined: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    placement = Placement(workers=1, address=joined)
    records, _ = run(placement, lambda: WritesBehind(tmp_path, 2.0), range(5))
    assert sorted(record["shard"] for record in records) == list(range(5))
    assert set((tmp_path / "written").read_text().split()) == set("01234")
    assert "a worker died at shard 2 and 3, to be done by the next" in capfd.readouterr().err


class GpuFails(Fake):
    """A worker whose GPU fails at shard 2, as often as is asked; leaves a note of each shard."""

    def __init__(self, folder: Path, times: int) -> None:
        super().__init__()
        self._folder, self._times = folder, times

    def __call__(self, shard: int, tell: Tell) -> dict[str, Any]:
        with (self._folder / str(os.getpid())).open("a") as file:
            file.write(f"{shard}\n")
        if shard == 2 and len(list(self._folder.glob("failed-*"))) < self._times:
            (self._folder / f"failed-{os.getpid()}").touch()
            raise WorkerLostError("cuda:0 failed (CUDA error: device-side assert triggered)")
        return super().__call__(shard, tell)


def test_map__a_process_whose_gpu_failed_is_replaced_by_another(
    joined: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records, _ = run(Placement(workers=1, address=joined), lambda: GpuFails(tmp_path, 1), range(5))
    assert sorted(record["shard"] for record in records) == list(range(5))
    (failed,) = tmp_path.glob("failed-*")
    done = (tmp_path / failed.name.removeprefix("failed-")).read_text().split()
    assert done[-1] == "2"  # it was given no other
    told = capfd.readouterr().err
    assert "device-side assert triggered); a worker died at shard 2, to be done by the" in told


def test_map__workers_whose_gpus_always_fail_end_the_run_with_their_error(
    joined: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_shards, "MOST_FAULTS", 1)
    told = r"no worker is left whose GPU works: on .*: cuda:0 failed \(CUDA error: device-side"
    with pytest.raises(UserError, match=told) as raised:
        run(Placement(workers=2, address=joined), lambda: GpuFails(tmp_path, 9), range(2, 3))
    assert "\n" not in str(raised.value)


def test_map__an_actor_whose_gpu_keeps_failing_is_left_out(
    joined: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_shards, "MOST_FAULTS", 1)
    records, _ = run(Placement(workers=2, address=joined), lambda: GpuFails(tmp_path, 1), range(5))
    assert sorted(record["shard"] for record in records) == list(range(5))
    assert "its GPU failed 1 times in a row: it is left out, 1 workers" in capfd.readouterr().err


class RunsOut(FailsOnce):
    """Its memory runs out."""

    def fail(self) -> None:
        raise MemoryError("Unable to allocate 2.00 GiB")


def test_map__a_process_whose_memory_ran_out_is_replaced_and_its_gpu_is_not_blamed(
    joined: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_shards, "MOST_FAULTS", 1)
    records, _ = run(Placement(workers=1, address=joined), lambda: RunsOut(tmp_path), range(4))
    assert sorted(record["shard"] for record in records) == list(range(4))
    (again,) = [record["process"] for record in records if record["shard"] == 2]
    assert str(again) != (tmp_path / "tried").read_text()
    told = capfd.readouterr().err
    assert "memory ran out (Unable to allocate 2.00 GiB): fewer --workers need less of it; " in told
    assert "a worker died at shard 2, to be done by the next" in told
    assert "Traceback" not in told


def test_map__a_ray_that_cannot_be_started_here_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("The current node timed out during startup.\nThis may be many things.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    told = (
        r"^Ray cannot be started on this machine \(The current node timed out during startup\.\): "
    )
    with (
        pytest.raises(UserError, match=told) as raised,
        open_workers(Placement(workers=1, device="cpu")) as workers,
    ):
        workers.once(os.getpid)
    assert "\n" not in str(raised.value)


class BreaksGpu(Fake):
    """The GPU that is used first is broken; the worker of another one is killed once after that."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __call__(self, shard: int, tell: Tell) -> dict[str, Any]:
        broken, gpu = self._folder / "broken", str(ray.get_gpu_ids()[0])
        with contextlib.suppress(FileExistsError), broken.open("x") as file:
            file.write(gpu)
        if gpu == broken.read_text():
            raise WorkerLostError("cuda:0 failed (CUDA error: uncorrectable ECC error)")
        mark = self._folder / "killed"
        if shard == 4 and not mark.exists():
            mark.touch()
            time.sleep(1)  # what Ray is given back by then, it gives to the next
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(shard, tell)


def test_map__a_broken_gpu_is_given_to_no_other_worker(
    joined: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_shards, "MOST_FAULTS", 1)
    records, _ = run(Placement(workers=2, address=joined), lambda: BreaksGpu(tmp_path), range(5))
    assert sorted(record["shard"] for record in records) == list(range(5))
    assert (tmp_path / "killed").exists()
    # In the end it is Ray's again.
    everything = ray.util.placement_group([{"GPU": 4}])
    assert everything.wait(20)
    ray.util.remove_placement_group(everything)


def gpu_is_gone() -> Fake:
    raise WorkerLostError("there is no GPU any more")


def test_map__actors_that_cannot_be_built_for_want_of_a_gpu_are_left_out(
    joined: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_shards, "MOST_FAULTS", 2)
    told = "no worker is left whose GPU works: on .*: there is no GPU any more$"
    with pytest.raises(UserError, match=told):
        run(Placement(workers=1, address=joined), gpu_is_gone, range(3))
    assert "there is no GPU any more; a worker died at shard 0, to be" in capfd.readouterr().err


class Loses:
    """Stands for an actor that works, with answers of which one does not arrive."""

    def __init__(self, lost: int) -> None:
        self._behind, self._before, self._lost = OneBehind(self._write), Future[Record](), lost
        self.worked: list[int] = []
        self.ready = SimpleNamespace(remote=lambda: lambda: None)

    def _write(self, shard: int, tell: Tell) -> Future[Record]:
        """Each shard is written when the next one was made, or is waited for."""
        self._end()
        self.worked.append(shard)
        self._before, self._shard = Future(), shard
        return self._before

    def _end(self) -> None:
        if self.worked and not self._before.done():
            self._before.set_result({"shard": self._shard})

    def ask(self, shard: int | None) -> Callable[[], str]:
        if shard is None:
            self._end()
            written = self._behind.finish()
        else:
            written = self._behind.do(shard, lambda images: None)
        self._lost -= 1

        def answer(lost: bool = self._lost == 0) -> str:
            if lost:
                raise ray.exceptions.ActorUnavailableError("the network", b"0" * 16)
            return json.dumps(written)

        return answer


@pytest.mark.parametrize("lost", range(1, 8))
def test_map__an_actor_out_of_reach_for_a_while_may_tell_of_shards_twice(
    lost: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "wait", lambda asked, **_: (asked[:1], asked[1:]))
    monkeypatch.setattr(ray, "get", lambda answer: answer())
    actor = Loses(lost)
    given = ray_shards._Given([ray_shards._Actor(actor)], range(5), Loses.ask)
    assert sorted(record["shard"] for record in given.records(None)) == list(range(5))
    assert (len(actor.worked) > 5) == (lost < 7)


class Forgets(Loses):
    """Stands for an actor whose process dies after one of its answers, before it is asked again."""

    def __init__(self, answers: int) -> None:
        super().__init__(lost=0)
        self._answers, self.asked = answers, 0

    def ask(self, shard: int | None) -> Callable[[], str]:
        answer = super().ask(shard)
        self.asked += 1
        assert self.asked < 20, "it is asked for ever"
        if self.asked == self._answers:
            self._before, self._behind = Future(), OneBehind(self._write)
            self._before.set_result({})
        return answer


@pytest.mark.parametrize("answers", range(1, 7))
def test_map__does_again_what_a_process_forgot_that_died_between_its_calls(
    answers: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "wait", lambda asked, **_: (asked[:1], asked[1:]))
    monkeypatch.setattr(ray, "get", lambda answer: answer())
    actor = Forgets(answers)
    given = ray_shards._Given([ray_shards._Actor(actor)], range(5), Forgets.ask)
    assert sorted(record["shard"] for record in given.records(None)) == list(range(5))
    assert sorted(actor.worked) == sorted([*range(5), *([answers - 1] if answers < 6 else [])])
    told = capfd.readouterr().err
    assert (f"a worker died at shard {answers - 1}, to be done" in told) == (answers < 6)


def test_map__tells_how_far_shards_are(joined: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "WATCH_SECONDS", 0.2)
    records, told = run(Placement(workers=2, address=joined), lambda: Fake(1.5), range(4))
    assert {shard: said.images for shard, said in told[-1].items()}.items() >= {0: 1, 1: 2}.items()
    assert told[-1][0].worker in {record["worker"] for record in records}


def test_once__runs_where_a_worker_would(joined: str) -> None:
    with open_workers(Placement(workers=1, address=joined)) as workers:
        assert workers.once(os.getpid) != os.getpid()
        assert len(workers.once(ray.get_gpu_ids)) == 1


def dies() -> Fake:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_map__workers_that_only_die_are_given_up(
    joined: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_shards, "MOST_DEATHS", 1)
    with pytest.raises(UserError, match="workers died 3 times and did not one shard"):
        run(Placement(workers=2, address=joined), dies, range(4))
    assert "a worker died at shard" in capfd.readouterr().err


def test_open_workers__leaves_a_ray_of_the_caller_alone(four_gpus: str) -> None:
    for address in (four_gpus, "here"):
        with pytest.raises(SettingError), open_workers(Placement(workers=1, address=address)):
            pass
        assert ray.is_initialized()
