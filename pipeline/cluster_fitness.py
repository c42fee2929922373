"""Whether a cluster can be joined and its nodes can work, said in one sentence each.

Nothing here knows Ray: what is asked of a node is a plain function, what came of it plain data.
"""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import __version__
from ..errors import MismatchError, MissingError, SettingError, first_line

ANSWER_SECONDS = 5.0
"""Seconds that a cluster has to take a connection; Ray itself would wait for minutes."""

MAKE_BYTES = (
    "torch",
    "torchvision",
    "timm",
    "pillow",
    "simplejpeg",
    "numpy",
    "pyarrow",
    "zarr",
    "numcodecs",
)
"""Packages whose version may change the bytes of a store."""

_GUIDE = "docs/cluster.md says what must be installed where"


def refuse_address(address: str) -> None:
    """Raise a `SettingError` unless something answers at the address of a cluster.

    Args:
        address: ``host:port``, or ``auto`` for Ray's own search, which is not tried here.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or "/" in host:
        raise SettingError(
            f"--address is {address}: expected host:port of `ray start --head`, such as "
            "10.0.0.1:6379, or auto for the cluster that this machine is a node of"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise SettingError(
            f"--address is {address}: nothing answers there ({error}); expected host:port of "
            "`ray start --head`"
        ) from error


def joining_refusal(address: str, error: BaseException) -> SettingError:
    """What to mend when Ray did not join a cluster.

    Args:
        address: Where the cluster was looked for.
        error: What Ray raised.
    """
    reasons = [error]
    while cause := reasons[-1].__cause__ or reasons[-1].__context__:
        reasons.append(cause)
    text = "\n".join(f"{type(reason).__name__}: {reason}" for reason in reasons)
    start = f"--address is {address}: "
    if "AuthenticationError" in text or "InvalidAuthToken" in text:
        given = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
        which = "there is none here or another one" if given else "RAY_AUTH_MODE is not token here"
        return SettingError(
            f"{start}the cluster there asks for a token, and {which}; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH to a file with the token that the cluster was started with (or "
            "RAY_AUTH_TOKEN to the token itself)"
        )
    if "Version mismatch" in text:
        versions = " ".join(text.partition("Version mismatch: ")[2].split())
        return SettingError(
            f"{start}Ray and Python must have the same versions everywhere. {versions}; {_GUIDE}"
        )
    if "No node info found" in text:
        return SettingError(
            f"{start}this machine is no node of the cluster there: run the command on one of its "
            "nodes, or start Ray here with `ray start --address` first"
        )
    return SettingError(
        f"{start}no Ray cluster can be joined there ({first_line(error)}); expected "
        "host:port of `ray start --head`"
    )


def node_report(paths: Sequence[str]) -> Callable[[], dict[str, Any]]:
    """A function that says of the node where it is called whether workers can work there.

    It is pickled by value and imports what it uses, so that it runs on a node without semmae.

    Args:
        paths: Absolute paths that must be there.
    """
    packages = MAKE_BYTES

    def report() -> dict[str, Any]:
        import importlib
        import importlib.metadata
        import pathlib
        import socket
        import sys

        def seen(path: str) -> bool:
            place = pathlib.Path(path)
            # A folder that lacks its mount is there, and empty.
            try:
                return any(place.iterdir()) if place.is_dir() else place.exists()
            except OSError:
                return False

        try:
            semmae = importlib.import_module("semmae").__version__
        except ImportError:
            semmae = None

        def version(package: str) -> str | None:
            try:
                # Builds for other devices compute alike.
                return importlib.metadata.version(package).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:
                return None

        return {
            "host": socket.gethostname(),
            "python": sys.executable,
            "semmae": semmae,
            **{package: version(package) for package in packages},
            "missing": [path for path in paths if not seen(path)],
        }

    return report


def refuse_unfit(reports: Sequence[Mapping[str, Any]]) -> None:
    """Refuse nodes that cannot work, or would not write the same bytes as this process.

    Args:
        reports: What `node_report` says of each node.

    Raises:
        MissingError: semmae is not installed on a node, or a path cannot be seen from it.
        MismatchError: A node has another version of semmae, or of one of `MAKE_BYTES`.
    """
    without = [f"{found['host']} ({found['python']})" for found in reports if not found["semmae"]]
    if without:
        raise MissingError(
            f"semmae is not installed on {_some(without)}: install version {__version__} for that "
            f"Python on every node; {_GUIDE}"
        )
    here = node_report([])()
    for name in ("semmae", *MAKE_BYTES):
        other = [
            f"{found[name]} on {found['host']}" for found in reports if found[name] != here[name]
        ]
        if other:
            raise MismatchError(
                f"{name} is {here[name]} here, but {_some(other)}: install the same version on "
                "every node, so that each writes the same bytes"
            )
    hidden = [path for found in reports for path in found["missing"]]
    if hidden:
        hosts = [found["host"] for found in reports if hidden[0] in found["missing"]]
        raise MissingError(
            f"{hidden[0]} cannot be seen on {_some(hosts)}: every node needs the data, the learner "
            "and the store at the same path, on storage that they share, or the data at a URL"
        )


def _some(names: Sequence[str]) -> str:
    """Up to three of some names, and how many more there are."""
    different = sorted(set(names))
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return ", ".join(different[:3]) + more
