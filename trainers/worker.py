"""Entry of the background worker, started BY FILE PATH: `python trainers/worker.py RUN_FOLDER`.

Portable Python ignores PYTHONPATH and the working folder, so a module name would not be found. This folder must not be
searched for modules: its `data`, `lock` or `launch` would hide others of that name.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]
    from trainers.session import main

    sys.exit(main(sys.argv[1:]))
