"""Cut rank shards anew: `python tools/reshard.py --from DIR --layout tp=2,pp=3 --out DIR2`."""

import sys

from megalite.tools.toolkit import tool

if __name__ == "__main__":
    sys.exit(tool("reshard"))
