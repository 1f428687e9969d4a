"""The command in the process of the tests."""

from __future__ import annotations

import pytest

from llama_state import cli
from tests.cli.commands import Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: exit status, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return command
