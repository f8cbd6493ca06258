"""Chat in the terminal: `python launch/chat.py --config FILE [section.key=value ...]`, or `--url URL`."""

import sys

from megalite.tools.toolkit import tool

if __name__ == "__main__":
    sys.exit(tool("chat"))
