"""Cut a Hugging Face model for a layout: `python tools/convert.py --model MODEL --layout tp=4,pp=2 --out DIR`."""

import sys

from megalite.tools.toolkit import tool

if __name__ == "__main__":
    sys.exit(tool("convert"))
