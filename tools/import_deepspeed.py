"""DeepSpeed checkpoints written elsewhere: `python tools/import_deepspeed.py --from CK --model MODEL --out HF_DIR`."""

import sys

from megalite.tools.toolkit import tool

if __name__ == "__main__":
    sys.exit(tool("import_deepspeed"))
