"""How every script begins and ends: Ctrl-C is one line at any moment, a user's error is one sentence.

``begin`` stands before PyTorch is imported, which takes seconds. ``run`` is around the whole command, and
``execute`` around that: it ends the process, whatever went wrong.
"""

import contextlib
import os
import signal
import sys


def begin(name):
    """Until ``run``, Ctrl-C ends the script with one line: nothing is there to be tidied up."""

    def interrupted(*_):
        os.write(2, f"{name}: interrupted\n".encode())
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)


def run(name, main, argv):
    """``main(argv)``, with what a user can get wrong as one sentence on standard error.

    Returns:
        The exit status: 0, 2 after a ``UserError``, 3 where a loss was not finite, 130 after Ctrl-C, 141
        where nobody reads on.
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
    except BrokenPipeError:  # as behind … | head
        return 141
    except RuntimeError as error:
        # raised wherever the program is when a worker has ended; what one raises is "Caught … in DataLoader"
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
    """``run(argv)``, then the end of the process: after an error that nobody foresaw with a traceback and
    status 1.
    """
    try:
        status = run(argv)
    except SystemExit as end:
        status = end.code or 0
    except Exception:
        sys.excepthook(*sys.exc_info())  # which names the rank where there are several
        _end(1)  # while the traceback still holds the loaders: to take them down could wait, too
    _end(status)


def _end(status):
    """No worker outlives the command, and after an error nothing delays the end.

    Python's own exit waits: for workers, which ignore its SIGTERM, for threads, and for what libraries have
    under way, such as an operation that other processes were to take part in.
    """
    import multiprocessing  # only now: ``begin`` comes first

    if workers := multiprocessing.active_children():
        if hasattr(signal, "SIGCHLD"):  # PyTorch's handler would raise an error for each of them
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
