"""Stopping long work: SIGTERM or Ctrl-C asks for it, a second one ends the process at once."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SECONDS_OF_ONE_REQUEST = 1.0
"""A launcher passes on a signal that its processes have got already: those are one request."""


class Stop:
    """A request to stop: of this process by a signal, or of any process of the run.

    Python calls its own handlers between two operations, and a backward pass on a CPU is one of
    minutes. So a thread hears the signals: it answers at once, and ends the process when asked to.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.agreed = False
        """All processes of the run know of it."""
        self._pipe: tuple[int, int] | None = None

    @property
    def requested_here(self) -> bool:
        return self.signal is not None

    @property
    def status(self) -> int:
        """Exit status of a process that a signal ended."""
        return 128 + (self.signal or signal.SIGINT)

    def clear(self) -> None:
        """Forget the request, at the start of another run in this process."""
        self.signal, self.agreed = None, False

    @contextlib.contextmanager
    def listen(self, promise: str) -> Iterator[None]:
        """Hear SIGTERM and Ctrl-C within the block; what was heard outlasts it.

        Args:
            promise: what the first one does, told to the user.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._pipe = heard, said = os.pipe()
        os.set_blocking(said, False)
        fd_before = signal.set_wakeup_fd(said, warn_on_full_buffer=False)
        before = {signum: signal.signal(signum, self._request) for signum in SIGNALS}
        _listening.append(self)
        thread = threading.Thread(target=self._hear, args=(heard, promise), daemon=True)
        thread.start()
        try:
            yield
        finally:
            _listening.remove(self)
            for signum, handler in before.items():
                signal.signal(signum, handler or signal.SIG_DFL)
            signal.set_wakeup_fd(fd_before)
            self._pipe = None
            os.close(said)  # which ends the thread
            thread.join()

    def _request(self, signum, frame) -> None:
        self.signal = self.signal or signal.Signals(signum)

    def _hear(self, heard: int, promise: str) -> None:
        first = None
        while byte := os.read(heard, 1):
            if byte[0] not in SIGNALS:
                continue
            name = signal.Signals(byte[0]).name
            # Written past Python's own files, whose locks another thread may hold.
            if first is None:
                first, self.signal = time.monotonic(), signal.Signals(byte[0])
                os.write(2, f"{name}: {promise} (again: at once, without saving)\n".encode())
            elif time.monotonic() - first > SECONDS_OF_ONE_REQUEST:
                os.write(2, f"{name} again: stopped at once\n".encode())
                os._exit(128 + byte[0])
        os.close(heard)


_listening: list[Stop] = []


def _forget_in_child() -> None:
    """In a forked process, such as a data loader's: only its parent ends it, by SIGTERM.

    torchrun, Slurm and a terminal send a signal to all processes of a run. The parent, which saves
    and stops, needs its data loaders until then.
    """
    if not _listening:
        return
    while _listening:
        for descriptor in _listening.pop()._pipe or ():
            os.close(descriptor)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


os.register_at_fork(after_in_child=_forget_in_child)
