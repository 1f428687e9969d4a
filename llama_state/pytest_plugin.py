"""The conformance check of llama_state as tests of any project's suite.

``pytest --llama-state-model M.gguf`` adds a test for each row. pytest imports every plugin that is
installed, so this imports nothing else of llama_state before it is asked to.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .context.model import Model
    from .testing.report import Row

_OPTION = "--llama-state-model"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the models, and the library."""
    group = parser.getgroup("llama_state", "states of llama.cpp")
    group.addoption(
        _OPTION,
        action="append",
        default=[],
        type=Path,
        metavar="M.gguf",
        help="test every way to save and restore states on this model; can be given again",
    )
    group.addoption(
        "--llama-state-library",
        type=Path,
        metavar="L",
        help="the libllama for these tests; default: the one that load_library() finds",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse models that are not there before anything is collected."""
    for path in config.getoption(_OPTION):
        if not path.is_file():
            raise pytest.UsageError(f"{_OPTION}: there is no file {path}")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Add the models to what the session has collected."""
    report = yield
    if isinstance(collector, pytest.Session) and report.passed:
        for path in collector.config.getoption(_OPTION):
            report.result.append(ModelRows.from_parent(collector, name=path.name, model=path))
    return report


class ModelRows(pytest.Collector):
    """The tests of one model, which is open while they run."""

    def __init__(self, *, model: Path, **node: Any) -> None:
        super().__init__(path=model, nodeid=model.name, **node)
        self._model: Model | None = None
        self._runs: dict[str, Iterator[Row]] = {}

    def collect(self) -> Iterable[pytest.Item]:
        """Yield the rows; nothing is loaded yet."""
        from .testing.conformance import CONFIGURATIONS, functions_of

        for configuration, options in CONFIGURATIONS.items():
            for function in functions_of(options):
                name = f"{configuration}: {function}"
                item = RowItem.from_parent(
                    self, name=name, configuration=configuration, function=function
                )
                if self.config.pluginmanager.hasplugin("xdist"):
                    item.add_marker(pytest.mark.xdist_group(f"{self.name}, {configuration}"))
                yield item

    def setup(self) -> None:
        """Open the model, or let each row report why that is impossible."""
        from ._llama.discovery import load_library
        from .context.model import Model
        from .errors import StateError

        problem = None
        try:
            library = load_library(self.config.getoption("--llama-state-library"))
            self._model = Model(self.path, library)
        except StateError as error:
            problem = str(error)
        if problem is not None:  # out here it is reported once, without the first exception
            pytest.fail(problem, pytrace=False)

    def teardown(self) -> None:
        """Close it."""
        self._runs.clear()
        if self._model is not None:
            self._model.close()

    def row(self, configuration: str, function: str) -> Row:
        """Return a row. Those of a configuration that are selected share one run."""
        for again in (False, True):
            if again or configuration not in self._runs:
                self._runs[configuration] = self._run(configuration)
            for row in self._runs[configuration]:
                if row.function == function or row.outcome == "not available":
                    return row
        raise AssertionError(f"no row {function}")

    def _run(self, configuration: str) -> Iterator[Row]:
        from .testing.conformance import CONFIGURATIONS, some_round_trips

        assert self._model is not None
        options = CONFIGURATIONS[configuration]
        items = (one for one in self.session.items if isinstance(one, RowItem))
        wanted = {
            one.called for one in items if one.parent is self and one.configuration == configuration
        }
        return some_round_trips(self._model, options, wanted, name=configuration)


class RowItem(pytest.Item):
    """One row: a way to save and restore, in one configuration."""

    parent: ModelRows

    def __init__(self, *, configuration: str, function: str, **node: Any) -> None:
        super().__init__(**node)
        self.configuration = configuration
        self.called = function  # pytest takes an attribute "function" for a test's own

    def runtest(self) -> None:
        """Fail where the state does not come back."""
        row = self.parent.row(self.configuration, self.called)
        if row.outcome == "not available":
            pytest.skip(row.detail)
        self.user_properties += [("bytes", row.nbytes), ("nmse", row.nmse)]
        if not row.ok:
            pytest.fail(f"{row.outcome}: {row.detail}", pytrace=False)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Say which model and which row."""
        return self.path, None, f"{self.parent.name}: {self.name}"
