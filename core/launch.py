"""The old name of standalone.launch: `python -m core.launch` and `accelerate launch -m core.launch` still work."""

import sys

from standalone.launch import main

if __name__ == "__main__":
    sys.exit(main())
