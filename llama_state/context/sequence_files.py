"""The files of one sequence: a part of the context's public class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .._io import Progress, StrPath
from .._io.arguments import checked
from .._llama.facts import Facts
from .._llama.handles import Owner
from ..layout import RestorePoint
from .state import ContextState, Restored


@checked
class SequenceFiles(Owner):
    """Saves and loads sequence files; see :class:`llama_state.Context`."""

    _facts: Facts
    _state: ContextState

    def seq_save_state(
        self,
        path: StrPath,
        seq_id: int = 0,
        tokens: Iterable[int] | None = None,
        *,
        durable: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
        restore_points: Sequence[RestorePoint] = (),
    ) -> int:
        """Write one sequence to a sequence file, as ``llama_state_seq_save_file`` would.

        Other arguments, result and errors as :meth:`save_state`.

        Args:
            restore_points: Partial snapshots of earlier moments, the earliest first, for a
                llama-server that goes back to them (build 11549 or newer; older ones ignore
                them).

        Raises:
            FormatError: One of them is no partial state of this sequence.
        """
        target = self._facts.check_sequence(seq_id)
        return self._state.save(
            target,
            path,
            tokens,
            restore_points,
            durable=durable,
            progress=progress,
            memory_limit=memory_limit,
        )

    def seq_load_state(
        self,
        path: StrPath,
        dest_seq_id: int = 0,
        *,
        validate: bool = True,
        progress: Progress | None = None,
        memory_limit: int | None = None,
        tokens: Iterable[int] | None = None,
        restore_points: bool = False,
    ) -> Restored:
        """Replace one sequence by that of a sequence file; the others stay.

        Other arguments, result and errors as :meth:`load_state`.

        Args:
            restore_points: Return those of a slot file of llama-server too, as copies.
        """
        target = self._facts.check_sequence(dest_seq_id)
        return self._state.load(
            target,
            path,
            tokens,
            restore_points,
            validate=validate,
            progress=progress,
            memory_limit=memory_limit,
        )
