"""The door over any ranks: `door.py RANKS stdin|no SCRIPT ARGUMENT...`."""

import sys

from megalite.run.launcher import run_ranks

if __name__ == "__main__":
    ranks, stdin, *command = sys.argv[1:]
    sys.exit(run_ranks(command, int(ranks), stopped_timeout=1.0, stdin=stdin == "stdin"))
