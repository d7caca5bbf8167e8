"""`python -m stackbert_kernels` is `stackbert`; torchrun starts it so."""

import sys

from stackbert_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
