"""Runs a script with its arguments; the first attempt to open a socket, or to look up a name, is an error that nothing can
catch away: it is written to the standard error and the process ends with code 97.

python no_sockets.py SCRIPT [ARGUMENTS]
"""

import os
import runpy
import sys
import traceback


def hook(event: str, arguments: tuple[object, ...]) -> None:
    if event.startswith("socket.") and event != "socket.gethostname":
        traceback.print_stack()
        os.write(2, f"\nopened a socket: {event} {arguments}\n".encode())
        os._exit(97)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.addaudithook(hook)
    runpy.run_path(sys.argv[0], run_name="__main__")
