"""The command line. One function per verb; what a verb needs is imported inside it, so that `status` is quick.

Exit codes: 0 done, 1 an error (one message, no traceback), 2 wrong usage, 3 the run that was followed was stopped,
130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..environment import go_offline
from ..errors import VideoTrainerError
from . import check, files, runs


def main(arguments: Sequence[str]) -> int:
    """Run one verb and return the exit code."""
    options = make_parser().parse_args(arguments)
    go_offline()
    try:
        return int(options.verb(options) or 0)
    except VideoTrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        return 1
    except OSError as error:  # a full disk, a folder that may not be written
        print(
            f"error: {error.filename or 'a file'} cannot be used ({error.strerror or error}). Check the disk and the permissions.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of every verb; `options.verb` is the function to call."""
    parser = argparse.ArgumentParser(prog="python -m trainers", description="Train LoRAs for video models on the files you have.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    files.add_verbs(verbs)
    runs.add_verbs(verbs)
    check.add_verbs(verbs)
    return parser
