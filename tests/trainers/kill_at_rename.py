"""Runs a script with its arguments, and kills this process, as kill -9 does, when it is about to rename something to a name.

python kill_at_rename.py NAME SCRIPT [ARGUMENTS]
"""

import os
import runpy
import signal
import sys


def main() -> None:
    name, script = sys.argv[1], sys.argv[2]
    sys.argv = sys.argv[2:]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and os.path.basename(str(arguments[1])) == name:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    runpy.run_path(script, run_name="__main__")


main()
