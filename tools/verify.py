"""Prove that weights are whole: `python tools/verify.py DIR [--against MODEL]`."""

import sys

from megalite.tools.toolkit import tool

if __name__ == "__main__":
    sys.exit(tool("verify"))
