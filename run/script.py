"""The start and end of every script: turns Ctrl-C and user errors into one-line messages.

A script calls ``begin`` before it imports PyTorch, which takes seconds. ``run`` runs the command and returns
the exit status. ``execute`` calls ``run`` and ends the process, whatever went wrong.
"""

import contextlib
import os
import signal
import sys


def begin(name):
    """Until ``run`` is called, Ctrl-C prints one line and ends the script: there is nothing to save."""

    def interrupted(*_):
        os.write(2, f"{name}: interrupted\n".encode())
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)


def run(name, main, argv):
    """Call ``main(argv)``; a ``UserError`` becomes one sentence on standard error.

    Returns:
        The exit status: 0, 2 after a ``UserError``, 3 if a loss is not finite, 130 after Ctrl-C, 141 if the
        reader of the output has gone.
    """
    from utils import NonFiniteError, UserError

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(argv)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as with … | head
        return 141
    except RuntimeError as error:
        # raised anywhere when a worker has died; an error that a worker raises is "Caught … in DataLoader"
        if "DataLoader worker (pid" not in str(error):
            raise
        print(
            f"{name}: a process that decodes images has ended ({str(error).splitlines()[0]}): it may have "
            "run out of memory; use fewer --workers; --resume auto continues a run",
            file=sys.stderr,
        )
        return 2
    return 0


def execute(run, argv):
    """Call ``run(argv)`` and end the process with its status; after an unforeseen error, with a traceback
    and status 1.
    """
    try:
        status = run(argv)
    except SystemExit as end:
        status = end.code or 0
    except Exception:
        sys.excepthook(*sys.exc_info())  # names the rank if there are several processes
        _end(1)  # now, while the traceback keeps the loaders alive: shutting them down could block
    _end(status)


def _end(status):
    """End the process so that no worker outlives it and, after an error, nothing delays the end.

    Python's own exit waits for workers, which ignore its SIGTERM, for threads, and for unfinished operations
    of libraries, such as a reduction that other processes do not join.
    """
    import multiprocessing  # here and not above, since ``begin`` comes first

    if workers := multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):  # PyTorch's handler would raise an error for each worker
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(5)
    if status:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads it
                stream.flush()
        os._exit(status)
