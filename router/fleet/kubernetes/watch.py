"""Lists and watches EndpointSlices, again and again, in a thread of its own.

Owned by KubernetesDiscovery. One turn lists if it must, then watches until the watch ends. A watch
that ended or broke off goes on from the last resourceVersion; after one that could not be opened,
or said what can't be understood, the next turn lists anew. Invariant: `publish` gets a set of
workers only after the API server has said it; while the server is lost, nothing.
"""

import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from core.clock import Clock
from router.fleet.kubernetes.api import ApiError, Lines, SliceApi
from router.fleet.kubernetes.metrics import DiscoveryMetrics
from router.fleet.kubernetes.slices import Census, Ignored, census
from router.fleet.kubernetes.store import GoneError, SliceStore, WatchError

log = logging.getLogger(__name__)

SYNCING = "Kubernetes has not answered yet."
EARLY_S = 0.5
"""A watch that ends sooner, and without a word, was none: the next one waits as after a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchTimes:
    """Seconds."""

    watch_s: float = 60.0
    """How long the server is asked to keep a watch open, more or less: a connection that died
    without a word is noticed after as long. Bookmarks come about once a minute, so silence until
    then means nothing."""
    backoff_first_s: float = 0.2
    backoff_max_s: float = 30.0


class SliceWatch:
    """See the module."""

    def __init__(
        self,
        api: SliceApi,
        publish: Callable[[Census], None],
        metrics: DiscoveryMetrics,
        clock: Clock,
        times: WatchTimes,
    ) -> None:
        self._api = api
        self._publish = publish
        self._metrics = metrics
        self._clock = clock
        self._times = times
        self._store = SliceStore()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._lines: Lines | None = None
        """The open watch; under the lock, since `stop` ends it."""
        self._backoff_s = times.backoff_first_s
        self.trouble = SYNCING
        """Why the set of workers is not known, or not as of now; empty if it is."""

    def run(self) -> None:
        """Go on until stopped; the thread's target."""
        while not self._stopped.is_set():
            wait_s = 0.0
            try:
                self._turn()
            except GoneError as gone:
                log.info("listing again: %s", gone)
                self._store.forget_version()
                wait_s = self._next_wait()
            except ApiError as error:
                wait_s = max(self._next_wait(), min(error.retry_after_s, self._times.backoff_max_s))
                self._note(str(error))
            except WatchError as error:
                # What the line would have said is lost, so only a list can tell.
                self._store.forget_version()
                wait_s = self._next_wait()
                self._note(f"A watch failed: {error}.")
            except Exception:
                self._store.forget_version()
                wait_s = self._next_wait()
                log.exception("discovery failed")
                self.trouble = "Discovery failed; the log says how."
            self._stopped.wait(wait_s)
        self._api.close()

    def stop(self) -> None:
        """Have `run` return soon. From any thread."""
        self._stopped.set()
        with self._lock:
            if self._lines is not None:
                self._lines.shut()

    def _turn(self) -> None:
        if not self._store.version:
            with self._counted("list"):
                items, version = self._api.list()
            self._synced(self._store.replace(items, version))
        self._watch()

    def _watch(self) -> None:
        # Jitter, so that routers that started together do not come back together for ever.
        watch_s = self._times.watch_s * random.uniform(0.75, 1.25)
        began = self._clock()
        try:
            with self._counted("watch"):
                lines = self._api.watch(self._store.version, watch_s)
        except ApiError:
            # Whoever answers next may have been restored to another past than this version's.
            self._store.forget_version()
            raise
        with self._lock:
            self._lines = lines
            if self._stopped.is_set():
                lines.shut()
        self._metrics.connected.set(1)
        if self.trouble not in ("", SYNCING):
            log.info("the API server tells of workers again")
        self.trouble = ""
        took = 0
        try:
            for line in lines:
                kind, changed = self._store.take(line)
                took += 1
                self._metrics.events.labels(kind.value.lower()).inc()
                self._synced(changed)
                self._backoff_s = self._times.backoff_first_s
        except (GoneError, WatchError):
            self._metrics.events.labels("error").inc()
            raise
        finally:
            self._metrics.connected.set(0)
            with self._lock:
                self._lines = None
            lines.close()
        if not took and self._clock() - began < EARLY_S:
            raise ApiError("error", "The API server ended a watch before its time.")
        self._backoff_s = self._times.backoff_first_s
        self._synced(False)

    def _synced(self, changed: bool) -> None:
        """The server confirmed what is known, perhaps after a change."""
        self._metrics.synced()
        if changed:
            found = census(self._store.slices)
            self._metrics.count(found.members, found.ignored)
            if found.ignored.get(Ignored.CONFLICT):
                log.warning("two EndpointSlices list one address for different roles or pools")
            self._publish(found)

    def _note(self, trouble: str) -> None:
        """Say once what is wrong; the metrics say for how long."""
        if trouble != self.trouble and not self._stopped.is_set():
            log.warning("%s Workers known so far are kept.", trouble)
            self.trouble = trouble

    def _next_wait(self) -> float:
        wait_s = random.uniform(self._backoff_s / 2, self._backoff_s)
        self._backoff_s = min(2 * self._backoff_s, self._times.backoff_max_s)
        return wait_s

    @contextmanager
    def _counted(self, verb: str) -> Iterator[None]:
        """Count a request by how it ended."""
        outcome = "ok"
        try:
            yield
        except GoneError:
            outcome = "gone"
            raise
        except ApiError as error:
            outcome = error.outcome
            raise
        except Exception:
            outcome = "error"
            raise
        finally:
            self._metrics.requests.labels(verb, outcome).inc()
