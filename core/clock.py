"""Where time comes from, so that tests can hold it still."""

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Returns seconds that never go back; comparable within one host, not between hosts."""

monotonic: Clock = time.monotonic
