"""A router that finds real workers through EndpointSlices, while they come, go and are replaced."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.cluster import QUICK_START, START_S, Cluster, make_worker, routed
from tests.support.kube.announce import Announcer, reader_token
from tests.support.kube.server import DIRECT, KubeServer, kube_server
from tests.support.process import wait_until

PROMPT = "one two three four five six seven eight nine ten eleven twelve"
SETTINGS = {
    "discovery": "kubernetes",
    "worker_silence_s": "2s",
    "reconnect_max_s": "500ms",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    with kube_server(tmp_path) as running:
        token = reader_token(running, "router")
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig(token)))
        for name, value in DIRECT.items():
            monkeypatch.setenv(name, value)
        yield running


class Traffic:
    """Completions one after the other, until told to end."""

    def __init__(self, system: Cluster, model: str) -> None:
        self.answers: list[str] = []
        self._model = model
        self._system = system
        self._errors: list[Exception] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic")

    def _run(self) -> None:
        with self._system.openai() as client:
            while not self._over.is_set() and not self._errors:
                try:
                    answer = client.completions.create(
                        model=self._model, prompt=PROMPT, max_tokens=12, temperature=0
                    )
                    self.answers.append(answer.choices[0].text)
                except Exception as error:
                    self._errors.append(error)

    def more(self, count: int = 2) -> None:
        """Until so many more were answered: what was in flight is not counted."""
        wanted = len(self.answers) + count + 1
        wait_until(lambda: len(self.answers) >= wanted or self._errors, 60, "more completions")
        assert not self._errors, self._errors

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join(60)
        assert not self._errors, self._errors
        assert len(set(self.answers)) == 1, "greedy answers differ"


def test_completions_go_on_while_workers_come_go_and_are_replaced(
    server: KubeServer, tiny_llama: Path
) -> None:
    listed = Announcer(server)
    prefill, first, second = (
        make_worker(role, tiny_llama, "nixl", QUICK_START)
        for role in ("prefill", "decode", "decode")
    )
    with ExitStack() as stack:
        for worker in (prefill, first, second):
            stack.callback(worker.stack.close)
        prefill.start()
        first.start()
        system = stack.enter_context(
            routed(tiny_llama, prefill=[], decode=[], router=SETTINGS, wait=False)
        )
        system.router.wait_for_line("looking for workers in endpointslices", START_S)
        wait_until(lambda: _status(system) == 503, 30, "a router without workers")
        listed.announce(prefill)
        listed.announce(first)
        _attached(system, prefill=1, decode=1)

        traffic = Traffic(system, tiny_llama.name)
        with traffic.running():
            traffic.more()
            second.start()
            listed.announce(second)
            _attached(system, prefill=1, decode=2)

            listed.announce(first, terminating=True)
            _attached(system, prefill=1, decode=1)
            traffic.more()
            first.kill()
            listed.withdraw(first)
            wait_until(lambda: len(_workers(system)) == 2, 30, "the first to be forgotten")
            traffic.more()

            first.start()  # a new pod at the address of the one that went
            listed.announce(first)
            _attached(system, prefill=1, decode=2)

            server.stop()
            wait_until(
                lambda: "diptych_discovery_connected 0.0" in system.get("/metrics").text,
                30,
                "the router to miss the API server",
            )
            traffic.more()
            _attached(system, prefill=1, decode=2)
        assert {worker["pool"] for worker in _workers(system)} == {"prefill", "decode"}
        assert 'routing_total{mode="disaggregated"}' in system.get("/metrics").text
        system.prefill, system.decode = [prefill], [first, second]
        system.wait_balanced()


def _status(system: Cluster) -> int:
    try:
        return system.get("/ready").status_code
    except OSError:
        return 0


def _workers(system: Cluster) -> list[dict[str, object]]:
    workers: list[dict[str, object]] = system.get("/v1/fleet").json()["workers"]
    return workers


def _attached(system: Cluster, **wanted: int) -> None:
    wait_until(
        lambda: all(system.num_attached(role) == count for role, count in wanted.items()),
        START_S,
        f"{wanted} to be ready",
        lambda: system.log,
    )
