"""Any order of making, attaching, closing, dropping, collecting and forking kills nothing.

What happens is told to a worker process (``lifetime_worker.py``), so that a crash or a call that
hangs is a failed example. What must come of it is counted here: who holds which context, and
so who may use it, and when it must be freed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.context.lifetime_worker import EXPECTED, LIMIT
from tests.libllama import MODELS

pytestmark = [pytest.mark.libllama, pytest.mark.linux]

N_LOADED = 3  # tokens in the worker's file
CLOSED = "ClosedError"


class Remote:
    """The worker, started when it is needed; after a death by the next example."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, command: str, *arguments: object) -> object:
        """Let the worker do something.

        Returns:
            What it returned; of an error of ours the name of the class.
        """
        process = self._process = self._process or self._start()
        timer = threading.Timer(2 * LIMIT, process.kill)
        timer.start()
        try:
            _pipe(process.stdin).write(json.dumps([command, *arguments]) + "\n")
            _pipe(process.stdin).flush()
            line = _pipe(process.stdout).readline()
        finally:
            timer.cancel()
        if not line:
            self._process = None
            status = process.wait()
            raise AssertionError(f"{command}{arguments} ended the process with {status}")
        kind, value, *text = json.loads(line)
        assert kind == "ok" or value == CLOSED, (command, arguments, value, text)
        return value

    def stop(self) -> None:
        if self._process is not None:
            _pipe(self._process.stdin).close()
            assert self._process.wait(LIMIT) == 0
            _pipe(self._process.stdout).close()

    def _start(self) -> subprocess.Popen[str]:
        model = MODELS["llama-dense"].path
        return subprocess.Popen(
            [sys.executable, "-m", "tests.context.lifetime_worker", model, str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@dataclass
class Owned:
    """A context or a model of ours.

    Attributes:
        model: Of a context: the name of its model.
        held: It was neither closed nor dropped.
        lost: It was dropped in a cycle: it lives until the next collection.
    """

    model: str = ""
    held: bool = True
    lost: bool = False


@dataclass
class Handle:
    """A context, or an attachment of one.

    Attributes:
        to: The name of the context; of one that another binding made, too.
        closed: It was closed itself.
        dropped: Nothing refers to it any more, but itself in a *cycle*.
    """

    to: str
    cycle: bool = False
    closed: bool = False
    dropped: bool = False


class Lifetimes(RuleBasedStateMachine):
    """The rules."""

    remote: ClassVar[Remote]

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[str, Owned] = {}
        self.contexts: dict[str, Owned] = {}
        self.handles: dict[str, Handle] = {}
        self.foreign: list[str] = []
        self.held_open: list[str] = []  # contexts that a thread is in a call on
        self.forked = False
        self.names = 0

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind} {self.names}"

    def pick(self, data: st.DataObject, names: list[str]) -> str:
        return data.draw(st.sampled_from(sorted(names)))

    def there(self) -> list[str]:
        """Handles that something refers to."""
        return [name for name, handle in self.handles.items() if not handle.dropped]

    def usable(self) -> list[str]:
        """Handles that are not closed, of contexts whose owner is there."""
        return [name for name in self.there() if self.outcome(name) == "used"]

    def outcome(self, name: str) -> str:
        handle = self.handles[name]
        if handle.to in self.foreign:
            return CLOSED if handle.closed else "used"
        context = self.contexts[handle.to]
        if handle.closed or not (context.held or context.lost):
            return CLOSED
        return "either" if context.lost else "used"

    # -- to make

    @initialize(data=st.data(), cycle=st.booleans())
    def begin(self, data: st.DataObject, cycle: bool) -> None:
        self.new_model()
        self.new_context(data, cycle)
        self.attach(data, "attach")

    @precondition(lambda self: len(self.models) < 3)
    @rule()
    def new_model(self) -> None:
        name = self.name("model")
        self.remote("model", name)
        self.models[name] = Owned()

    @precondition(lambda self: any(model.held for model in self.models.values()))
    @rule(data=st.data(), cycle=st.booleans())
    def new_context(self, data: st.DataObject, cycle: bool) -> None:
        model = self.pick(data, [name for name, model in self.models.items() if model.held])
        name = self.name("context")
        self.remote("context", name, model, cycle)
        self.contexts[name] = Owned(model)
        self.handles[name] = Handle(name, cycle)

    @precondition(lambda self: not self.foreign)
    @rule()
    def new_foreign(self) -> None:
        name = self.name("foreign")
        self.remote("make_foreign", name)
        self.foreign.append(name)

    @precondition(lambda self: self.usable() or self.foreign)
    @rule(data=st.data(), how=st.sampled_from(["attach", "adopt"]))
    def attach(self, data: st.DataObject, how: str) -> None:
        other = self.pick(data, self.usable() + self.foreign)
        to = self.handles[other].to if other in self.handles else other
        if to not in self.held_open:  # it would wait for the thread
            name = self.name("attachment")
            self.remote(how, name, other)
            self.handles[name] = Handle(to)

    # -- to use

    @precondition(lambda self: self.there())
    @rule(data=st.data(), how=st.sampled_from(sorted(EXPECTED)))
    def use(self, data: st.DataObject, how: str) -> None:
        name = self.pick(data, self.there())
        if self.handles[name].to not in self.held_open:
            outcome = self.outcome(name)
            got = self.remote("use", name, how)
            allowed = [] if outcome == "used" else [CLOSED]
            if outcome != CLOSED:
                allowed.append(EXPECTED[how])
            assert got in allowed, (name, how, outcome)

    @precondition(lambda self: self.usable())
    @rule(data=st.data(), action=st.sampled_from(["close", "drop", "collect"]))
    def load(self, data: st.DataObject, action: str) -> None:
        """Load a file, and in the middle of it close or drop something, or collect."""
        name = self.pick(data, self.usable())
        mine = [each for each in self.there() if self.handles[each].to == self.handles[name].to]
        target = self.pick(data, [*self.there(), *self.models_there()] + 3 * mine)
        busy = self.handles[name].to in self.held_open
        if busy or (target in self.handles and self.handles[target].to in self.held_open):
            return
        got = self.remote("load", name, action, target)
        self.note(action, target)
        outcome = self.outcome(name)
        if outcome == "used" or (name, action) == (target, "drop"):  # the call itself held it
            assert got == N_LOADED
        elif outcome == CLOSED:
            assert got == CLOSED

    @precondition(lambda self: self.usable())
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """Begin a call in a thread."""
        name = self.pick(data, self.usable())
        if self.handles[name].to not in self.held_open:
            self.remote("hold", name)
            self.held_open.append(self.handles[name].to)

    @precondition(lambda self: self.held_open)
    @rule()
    def let_go(self) -> None:
        results = self.remote("let_go")
        assert results == ["ok"] * len(self.held_open), results
        self.held_open.clear()

    # -- to end

    @precondition(lambda self: self.there() or self.models_there())
    @rule(data=st.data(), action=st.sampled_from(["close", "drop"]))
    def end(self, data: st.DataObject, action: str) -> None:
        name = self.pick(data, [*self.there(), *self.models_there()])
        waits = name in self.handles and self.handles[name].to in self.held_open
        if not (action == "close" and waits):
            self.remote(action, name)
            self.note(action, name)

    @rule(allocations=st.sampled_from([0, 1, 700]))
    def collect(self, allocations: int) -> None:
        """Collect now, and from now on at each so many allocations (0: never)."""
        self.remote("threshold", allocations)
        self.remote("collect")
        self.note("collect", "")

    @precondition(lambda self: not self.forked and (self.there() or self.models_there()))
    @rule()
    def fork(self) -> None:
        """In a forked process every use is an error at once, and the exit is clean."""
        self.forked = True  # once in an example: it takes long
        names = [*self.there(), *self.models_there()]
        said = self.remote("fork", names)
        assert isinstance(said, list)
        *answers, freed, status = said
        assert (freed, status) == ("0", "0")
        assert all(each in ("UnsupportedError", CLOSED) for each in answers)
        for name, answer in zip(names, answers, strict=True):
            if name in self.handles and self.outcome(name) == "used":
                assert answer == "UnsupportedError", name

    @precondition(lambda self: self.foreign)
    @rule(data=st.data())
    def make_again(self, data: st.DataObject) -> None:
        """Another binding frees its context and makes one at the same address, perhaps."""
        name = self.pick(data, self.foreign)
        if name in self.held_open:
            return
        self.remote("make_again", name)
        for handle in self.handles.values():
            handle.closed |= handle.to == name  # nobody may use it: it is dangling
        for each in [each for each, handle in self.handles.items() if handle.to == name]:
            if not self.handles[each].dropped:
                self.remote("close", each)
        assert self.remote("inherits", name) is False

    # -- what follows

    def models_there(self) -> list[str]:
        return [name for name, model in self.models.items() if model.held]

    def note(self, action: str, name: str) -> None:
        """Count what *action* has ended."""
        if action == "collect":
            for name, context in self.contexts.items():
                # A thread's call refers to what it was called on: the next collection takes it.
                context.lost &= name in self.held_open
        elif name in self.models:
            self.models[name].held = False
        else:
            handle = self.handles[name]
            handle.closed |= action == "close"
            handle.dropped |= action == "drop"
            if name in self.contexts:
                self.contexts[name].held = False
                # What is dropped in a cycle stays until the collector comes.
                self.contexts[name].lost = action == "drop" and handle.cycle and not handle.closed

    @invariant()
    def freed_in_time(self) -> None:
        """A context is freed when its owner has gone and no call runs; a model after it."""
        expected = {}
        for name, context in self.contexts.items():
            if not context.lost:
                expected[name] = not context.held and name not in self.held_open
        for name, model in self.models.items():
            mine = [each for each, context in self.contexts.items() if context.model == name]
            if all(each in expected for each in mine):
                expected[name] = not model.held and all(expected[each] for each in mine)
        assert self.remote("freed", sorted(expected)) == expected

    def teardown(self) -> None:
        assert self.remote("reset") == []


def test_lifetimes(tmp_path: Path) -> None:
    """Any order of all that is above."""
    Lifetimes.remote = Remote(tmp_path)
    try:
        run_state_machine_as_test(
            Lifetimes, settings=settings(stateful_step_count=30, deadline=None)
        )
    finally:
        Lifetimes.remote.stop()
