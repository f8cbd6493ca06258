"""What is this checkpoint? `python tools/describe.py PATH [--tensor NAME] [--json]`."""

import sys

from megalite.tools.toolkit import tool

if __name__ == "__main__":
    sys.exit(tool("describe"))
