"""Checks that imports point down only: `python tools/check_imports.py`."""

import sys

from megalite.tools.toolkit import tool

if __name__ == "__main__":
    sys.exit(tool("check_imports"))
