"""`python -m router`: a router without the command line around it."""

import sys

from router.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
