"""Entry of the command line: `python -m trainers VERB`, or by file path, `python <pack>/trainers/__main__.py VERB`.

The search path is set as in `worker.py`, and for the same reasons.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]
    from trainers.cli import main

    sys.exit(main(sys.argv[1:]))
