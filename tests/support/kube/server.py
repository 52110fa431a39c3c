"""Runs the server beside a test: TLS, tokens, a kubeconfig, and ways to be nasty to its clients."""

import asyncio
import logging
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import trustme
import uvicorn
import yaml

from tests.support.kube.app import KubeApp
from tests.support.kube.failure import Failure
from tests.support.kube.kinds import BUILT_IN, Kind
from tests.support.kube.rights import ADMIN, Subject
from tests.support.kube.store import Object
from tests.support.process import free_port, wait_until

T = TypeVar("T")
DEADLINE_S = 10.0
DIRECT = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
"""Variables that keep clients from asking a proxy for the server."""


class KubeServer:
    """An API server at https://127.0.0.1:PORT. Call it from the test's thread."""

    def __init__(self, folder: Path, served: list[Kind]) -> None:
        self.app = KubeApp(served)
        self.port = free_port()
        self.folder = folder
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.crt"))
        self._certificate = authority.issue_cert("127.0.0.1", "localhost")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        for name in ("default", "kube-system"):
            self.app.store.create(self.kind("Namespace"), "", {"metadata": {"name": name}})

    def start(self) -> None:
        """Listen, with what it knew when it stopped."""
        config = uvicorn.Config(
            self.app,  # type: ignore[arg-type]
            host="127.0.0.1",
            port=self.port,
            loop="asyncio",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        config.load()
        config.ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._certificate.configure_cert(config.ssl)
        self._server = server = uvicorn.Server(config)

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await server.serve()
            while connections := server.server_state.connections:
                for each in list(connections):
                    each.transport.abort()
                await asyncio.sleep(0.01)

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="kube")
        self._thread.start()
        wait_until(lambda: server.started, DEADLINE_S, "the API server to listen")

    def stop(self) -> None:
        """Drop every connection and stop listening."""
        if self._server is None or self._thread is None:
            return
        self.cut_watches()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self._server = self._thread = None

    def call(self, function: Callable[[], T]) -> T:
        """Run something on the server's event loop."""
        assert self._loop is not None

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(DEADLINE_S)

    # Objects.

    def put(self, item: Object) -> Object:
        """Create an object, or write over it."""
        kind = self.kind(item["kind"])
        namespace = item["metadata"].get("namespace", "default") if kind.namespaced else ""

        def write() -> Object:
            try:
                self.app.store.get(kind, namespace, item["metadata"]["name"])
            except Failure:
                return self.app.store.create(kind, namespace, item)
            return self.app.store.replace(kind, namespace, item)

        return self.call(write)

    def set_status(self, kind: str, name: str, status: Object, namespace: str = "default") -> None:
        """Play the controller of an object."""
        item = {"metadata": {"name": name}, "status": status}
        served = self.kind(kind)
        self.call(lambda: self.app.store.replace(served, namespace, item, "status"))

    def get(self, kind: str, name: str, namespace: str = "default") -> Object:
        served = self.kind(kind)
        where = namespace if served.namespaced else ""
        return self.call(lambda: self.app.store.get(served, where, name))

    def find(self, kind: str, namespace: str | None = None) -> list[Object]:
        return self.call(lambda: list(self.app.store.find(self.kind(kind), namespace)))

    def delete(self, kind: str, name: str, namespace: str = "default") -> None:
        served = self.kind(kind)
        self.call(lambda: self.app.store.delete(served, namespace, name))

    # Trouble.

    def compact(self) -> None:
        """Forget all changes so far; watches that are open go on."""
        self.call(self.app.store.compact)

    def cut_watches(self, last_words: bytes = b"") -> None:
        self.call(lambda: [watch.cut(last_words) for watch in self.app.watches])

    def bookmark(self) -> None:
        self.call(lambda: [watch.bookmark() for watch in self.app.watches])

    def refuse(self, answer: Callable[[str, str], Failure | None]) -> None:
        """Answer by verb and resource; None: as usual."""
        self.call(lambda: setattr(self.app, "refuse", answer))

    def watching(self, plural: str) -> int:
        """Watches that are open."""
        return self.call(lambda: sum(each.kind.plural == plural for each in self.app.watches))

    def asked(self, verb: str, plural: str) -> int:
        """Requests so far."""
        return self.call(lambda: self.app.requests.count((verb, plural)))

    # Credentials.

    def token(self, service_account: str, namespace: str = "default") -> str:
        """A token of a service account, which may do what Roles allow it."""
        token = f"token-of-{namespace}-{service_account}"
        self.call(lambda: self.app.subjects.__setitem__(token, Subject(service_account, namespace)))
        return token

    def kubeconfig(
        self, token: str = ADMIN, namespace: str = "default", port: int | None = None
    ) -> Path:
        """A file that KUBECONFIG can name; `port` is that of a proxy."""
        authority = str(self.folder / "ca.crt")
        url = f"https://127.0.0.1:{port or self.port}"
        cluster = {"server": url, "certificate-authority": authority}
        path = self.folder / f"kubeconfig-{token}-{namespace}-{port or self.port}.yaml"
        context = {"cluster": "test", "user": "test", "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "contexts": [{"name": "test", "context": context}],
            "users": [{"name": "test", "user": {"token": token}}],
        }
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    def kind(self, name: str) -> Kind:
        """A kind that is served."""
        return next(each for each in self.app.served if each.kind == name)


@contextmanager
def kube_server(folder: Path, served: list[Kind] | None = None) -> Iterator[KubeServer]:
    """A server with the namespaces `default` and `kube-system`."""
    server = KubeServer(folder, served or BUILT_IN)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def environment(kubeconfig: Path) -> dict[str, str]:
    """What a client process needs to reach the server and no other."""
    home = kubeconfig.parent
    return {
        **os.environ,
        "KUBECONFIG": str(kubeconfig),
        "HOME": str(home),
        **DIRECT,
    }
