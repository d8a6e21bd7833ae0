"""What runs first, before anything heavy is imported.

As process 1 of a container nemoserve gets no signal that it has no handler for, and a pod that is deleted while it
starts would wait for its whole grace period.
"""

from __future__ import annotations

import os
import signal
import sys

SERVING = ("serve", "nim-serve")


def main() -> None:
    """The command line. SIGTERM ends it at once until a server takes over: nothing has been accepted yet."""
    if os.getpid() == 1:
        # What was asked for is not done, except that a server which is told to stop has done its duty.
        code = 0 if sys.argv[1:2] and sys.argv[1] in SERVING else 128 + signal.SIGTERM
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
    from service.cli.main import main as command_line

    command_line()
