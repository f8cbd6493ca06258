"""Rank shards back to a Hugging Face folder: `python tools/export.py --from DIR --out HF_DIR`."""

import sys

from megalite.tools.toolkit import tool

if __name__ == "__main__":
    sys.exit(tool("export"))
