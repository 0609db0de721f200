"""`python -m qwen35_moe COMMAND`: the same as `qwen35-moe COMMAND`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
