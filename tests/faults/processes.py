"""Commands in processes that are forked off this one, which has imported everything before.

So a command starts in no time, and hundreds can be killed in minutes. A process may be killed from
outside at any time, or kill itself before the n-th time that it opens, makes, renames or removes
something below a folder.
"""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}


def import_everything() -> None:
    """Import in this process what the commands need; nothing is computed, so no thread starts."""
    import accelerate  # noqa: F401
    import fairseq_cli.hydra_train
    import fairseq_cli.train  # noqa: F401
    import transformers  # noqa: F401

    import metro.conversion.fairseq_to_hf
    import metro.conversion.hf_to_fairseq
    import metro.data.prompts.prepare
    import metro.data.text.corpus
    import metro.evaluation.evaluate
    import metro.evaluation.report.build
    import metro.evaluation.runs.runner
    import metro.finetuning.run
    import metro.finetuning.trainer
    import metro.ranking.run
    import metro.training.pretrain
    import metro.training.pretraining_trainer  # noqa: F401
    from metro.data.prompts import prepare
    from metro.data.text import reading, writing

    # Small inputs are to be interrupted as often as large ones.
    reading.CHUNK_BYTES, writing.CHECKPOINT_SECONDS = 4000, 0
    prepare.CHUNK_EXAMPLES, prepare.CHECKPOINT_SECONDS = 40, 0


def fork(work: Callable[[], object], log: Path | int) -> int:
    """Run a function in a new process, which writes what it says into a file; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        is_open = isinstance(log, int)
        descriptor = log if is_open else os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if not isinstance(error, Exception):
            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def command(words: Sequence[str], log: Path | int, env: dict[str, str], before=None) -> int:
    """Start `metro`, `fairseq-train` or `fairseq-hydra-train`; return the process's id."""

    def work() -> None:
        os.environ.update(env)
        sys.argv = list(words)
        main = main_of(words[0])
        if before is not None:
            before()
        main()

    return fork(work, log)


def main_of(program: str) -> Callable[[], object]:
    if program == "metro":
        from metro.cli.main import main
    elif program == "fairseq-train":
        from fairseq_cli.train import cli_main as main
    else:
        from fairseq_cli.hydra_train import cli_main as main
    return main


def ranks(number: int) -> list[dict[str, str]]:
    """Environments of so many processes, as torchrun sets them."""
    if number == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def wait(pid: int, seconds: float) -> int | None:
    """Wait for a process; its exit status, minus the signal that ended it, None if it goes on."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def end(pid: int) -> None:
    """End a process that is left, as torchrun ends the others of one that died."""
    if wait(pid, 10) is None:
        os.kill(pid, signal.SIGTERM)
        if wait(pid, 10) is None:
            os.kill(pid, signal.SIGKILL)
            wait(pid, 60)


def kill_before(number: int, folder: Path, count: Path | None = None) -> Callable[[], None]:
    """Let a process kill itself before an operation on files below a folder.

    Args:
        number: of the operation; 0 kills nothing.
        folder: operations elsewhere are not counted.
        count: file for a byte per operation.
    """

    def install() -> None:
        place, seen = str(folder), 0
        counter = os.open(count, os.O_CREAT | os.O_WRONLY) if count else None

        def hook(event: str, args: tuple) -> None:
            nonlocal seen
            if event not in EVENTS or not any(place in str(part) for part in args[:2]):
                return
            if event == "open" and not (isinstance(args[2], int) and args[2] & os.O_ACCMODE):
                return
            seen += 1
            if counter is not None:
                os.write(counter, b".")
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return install
