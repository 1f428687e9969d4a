"""A real server of the S3 protocol, moto's, in a process of its own on a free loopback port."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from types import TracebackType
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from tests.servers.ports import free_port

_START_SECONDS = 60
# What moto takes for its clock, some seconds off.
_PROGRAM = """
import sys, datetime
import moto.core.utils as utils
at, ahead = utils.utcnow, datetime.timedelta(seconds=float(sys.argv.pop(1)))
utils.utcnow = lambda: at() + ahead
from moto.server import main
main(sys.argv[1:])
"""
_SIGNED = "AWS4-HMAC-SHA256 Credential=x/20200101/us-east-1/{}/aws4_request, Signature=0"
_POLICY = (
    '{"Version": "2012-10-17", "Statement":'
    ' [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'
)


class S3Server:
    """A server that runs within the block. What it holds is lost when it stops.

    Args:
        clock: Seconds that its clock is ahead.
        checks: Whether it checks signatures: then :meth:`credentials` has a pair that is right.
    """

    def __init__(self, *, clock: float = 0.0, checks: bool = False) -> None:
        for package in ("obstore", "moto", "flask", "flask_cors"):
            if find_spec(package) is None:
                pytest.skip(f"no server of the S3 protocol: the package {package} is not installed")
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._clock = clock
        self._checks = checks
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, empty, on the port that it had."""
        env = dict(os.environ)
        if self._checks:  # these many first requests are let pass: those of the next function
            env["INITIAL_NO_AUTH_ACTION_COUNT"] = "4"
        arguments = ("-H", "127.0.0.1", "-p", str(self.port))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(self._clock), *arguments],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, "the server ended at once"
                assert time.monotonic() < end, "the server does not start"
                time.sleep(0.05)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def killed(self) -> bool:
        """Whether it does not run."""
        return self._process is None

    def pause(self) -> None:
        """Let it answer nothing until :meth:`resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def make_bucket(self, name: str) -> None:
        """Make a bucket with nothing in it."""
        self.request("PUT", f"/{name}")

    def request(self, method: str, path: str, data: bytes = b"", of: str = "s3") -> bytes:
        """Send a request of somebody whose signature is wrong, which is seldom checked."""
        url, headers = f"{self.endpoint}{path}", {"Authorization": _SIGNED.format(of)}
        if of == "s3":
            headers["Content-Type"] = "application/octet-stream"  # not a form, the default
        with urlopen(Request(url, data, headers, method=method), timeout=30) as answer:  # noqa: S310
            body = answer.read()
        assert isinstance(body, bytes)
        return body

    def credentials(self) -> tuple[str, str]:
        """Make the only user, and return its key and its secret; make one bucket after that."""
        self._iam(Action="CreateUser", UserName="user")
        text = self._iam(Action="CreateAccessKey", UserName="user")
        named = {"UserName": "user", "PolicyName": "all", "PolicyDocument": _POLICY}
        self._iam(Action="PutUserPolicy", **named)
        (key,) = re.findall("<AccessKeyId>(.*?)<", text)
        (secret,) = re.findall("<SecretAccessKey>(.*?)<", text)
        return key, secret

    def _iam(self, **query: str) -> str:
        data = urlencode({"Version": "2010-05-08", **query}).encode()
        return self.request("POST", "/", data, of="iam").decode()
