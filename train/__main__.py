"""`python -m train run|fit|validate|test|predict|audit|find-lr|find-batch-size …`"""
import sys

from train.cli import main

if __name__ == "__main__":
    sys.exit(main())
