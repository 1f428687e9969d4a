"""A bucket for the tests of a file, and what it is asked with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.s3_server import S3Server


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3Server]:
    """A server with a bucket, ``kept``."""
    with S3Server() as server:
        server.make_bucket("kept")
        yield server


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, which the server does not check, and no proxy to it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-shown")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
