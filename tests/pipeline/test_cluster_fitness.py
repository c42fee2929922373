import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from semmae import __version__
from semmae.errors import MismatchError, MissingError, SettingError, UserError
from semmae.pipeline.cluster_fitness import (
    joining_refusal,
    node_report,
    refuse_address,
    refuse_unfit,
)


@pytest.mark.parametrize("address", ["here", "ray://10.0.0.1:10001", ":6379", "host:", "local"])
def test_refuse_address__what_is_no_host_and_port_is_refused(address: str) -> None:
    with pytest.raises(SettingError, match=r"--address is .*: expected host:port of `ray start"):
        refuse_address(address)


@pytest.mark.parametrize("port", [70_000, None])
def test_refuse_address__where_nothing_answers_is_said_at_once(port: int | None) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = port or free.getsockname()[1]
        with pytest.raises(SettingError, match=f"127.0.0.1:{port}: nothing answers there"):
            refuse_address(f"127.0.0.1:{port}")


def test_refuse_address__one_that_answers_passes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        refuse_address(f"127.0.0.1:{server.getsockname()[1]}")
    refuse_address("auto")


def ray_error(*texts: str) -> Exception:
    """An error with causes, as Ray raises them: the first text is the outermost."""
    error: Exception | None = None
    for text in reversed(texts):
        outer = RuntimeError(text)
        outer.__cause__ = error
        error = outer
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("mode", "texts", "words"),
    [
        ("", ["Failed to connect", "RPC error: InvalidAuthToken: "], "MODE is not token here; set"),
        (
            "token",
            ["Failed to connect", "ray.AuthenticationError"],
            "none here or another",
        ),
        (
            "token",
            ["Version mismatch: The cluster was started with:\n    Ray: 2.59.0\n    Python: 3.12"],
            "The cluster was started with: Ray: 2.59.0 Python: 3.12",
        ),
        ("", ["Failed", "No node info found matching attributes: ''"], "is no node of the cluster"),
        ("", ["Failed to connect to it\nat all"], r"be joined there \(Failed to connect to it\)"),
    ],
)
def test_joining_refusal__says_what_to_mend(
    mode: str, texts: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    refusal = str(joining_refusal("10.0.0.1:6379", ray_error(*texts)))
    assert re.search(words, refusal)
    assert refusal.startswith("--address is 10.0.0.1:6379: ")
    assert "\n" not in refusal


def test_node_report__runs_where_semmae_is_not(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "mount").mkdir()
    paths = [str(tmp_path / name) for name in ("full", "full/file", "mount", "nothing")]
    pickled = tmp_path / "report"
    data: bytes = cloudpickle.dumps(node_report(paths))  # type: ignore[no-untyped-call]
    pickled.write_bytes(data)
    code = (
        "import pickle, sys; from pathlib import Path\n"
        "sys.modules['semmae'] = None\n"
        "found = pickle.loads(Path(sys.argv[1]).read_bytes())()\n"
        "print(found['semmae'], *found['missing'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, pickled], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["None", *paths[2:]]


def reports(**changes: Any) -> list[dict[str, Any]]:
    """What two nodes say, the second one with changes."""
    here = node_report([])()
    return [{**here, "host": "one"}, {**here, "host": "two", **changes}]


def test_refuse_unfit__nodes_like_this_process_pass() -> None:
    assert node_report([])()["semmae"] == __version__
    refuse_unfit(reports())
    refuse_unfit([])


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"semmae": None, "python": "/py"}, MissingError, r"not installed on two \(/py\): install"),
        ({"semmae": "0.0.1"}, MismatchError, r"semmae is .* here, but 0.0.1 on two: install"),
        ({"torch": "1.0"}, MismatchError, r"torch is .* here, but 1.0 on two: install"),
        ({"pyarrow": None}, MismatchError, r"pyarrow is .* here, but None on two: install"),
        ({"missing": ["/data"]}, MissingError, "/data cannot be seen on two: every node needs"),
    ],
)
def test_refuse_unfit__says_what_is_wrong_where(
    changes: dict[str, Any], kind: type[UserError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        refuse_unfit(reports(**changes))


def test_refuse_unfit__of_many_nodes_three_are_named() -> None:
    here = node_report([])()
    many = [{**here, "host": f"node{number}", "missing": ["/data"]} for number in range(9)]
    with pytest.raises(MissingError, match="on node0, node1, node2 and 6 more: every"):
        refuse_unfit(many)
