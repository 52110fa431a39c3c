"""What the facts about workers and the router mean. Pure."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from diptych.doctor.finding import Finding, fail, ok, skip, warn
from diptych.doctor.peers import RouterFacts, WorkerFacts
from rpc.v1 import worker_pb2

MAX_SKEW_S = 2.0
"""Above what dates of whole seconds can be wrong by. Logs and traces of processes whose clocks
differ more can't be read side by side; requests and leases do not depend on them."""
SLOW_LINK = 0.2
"""Part of the fastest link's speed below which a link is called slow. Source: own judgement."""
ROLES = {worker_pb2.ROLE_PREFILL: "prefill", worker_pb2.ROLE_DECODE: "decode"}


MEND_LINK = (
    "Read the logs of both; see that a NetworkPolicy lets the pools reach each other's KV ports, "
    "that both run the same transport (--kv-transport) and version, and with RDMA that both ports "
    "are in one fabric."
)


def check_worker(worker: WorkerFacts, *, token: bool, tls: bool) -> Iterator[Finding]:
    """Everything about one worker.

    Args:
        worker: facts about it.
        token: the doctor has a token.
        tls: the doctor has a CA, and so speaks TLS.
    """
    name = f"{worker.listed} {worker.address}"
    if worker.dns_error:
        yield fail(
            f"{name}: dns",
            f"the name of {worker.address} can't be resolved: {worker.dns_error}",
            "See that its Service exists in this namespace (kubectl get svc), and that the address "
            "is spelt as there.",
        )
        return
    if worker.tcp_error:
        yield fail(
            f"{name}: port",
            f"nothing can be reached at {worker.address}: {worker.tcp_error}",
            "Refused: no worker listens there (its log says why it ended), or on loopback only "
            "(--host 0.0.0.0). No answer: a NetworkPolicy or firewall, or a wrong address.",
        )
        return
    yield from _check_grpc(worker, name, token=token, tls=tls)
    yield from _check_metrics(worker, name)


def _check_grpc(worker: WorkerFacts, name: str, *, token: bool, tls: bool) -> Iterator[Finding]:
    if not worker.health:
        yield fail(f"{name}: grpc", *_no_health(worker, tls=tls))
        return
    if worker.health != "SERVING":
        yield warn(
            f"{name}: health",
            f"{worker.address} answers {worker.health}: it loads its model, or drains",
            "Wait, and see its log; if it stays so, its engine can't start.",
        )
    if worker.call_code == "UNAUTHENTICATED":
        yield fail(
            f"{name}: token",
            f"{worker.address} does not accept the token"
            if token
            else f"{worker.address} asks for a token, and none is given",
            "Give router, workers and the doctor the same auth_token (in Kubernetes: the same "
            "Secret, and pods restarted since it changed).",
        )
    elif worker.call_code == "UNAVAILABLE" and worker.health != "SERVING":
        yield skip(f"{name}: token", f"{worker.address} says who it is once its model is loaded")
    elif worker.call_code:
        yield fail(
            f"{name}: call",
            f"{worker.address} answers {worker.call_code}: {worker.call_error}",
            "See that it is a worker of the same version as this one.",
        )
    elif worker.description is not None:
        yield from _check_description(worker, worker.description, name)


def _no_health(worker: WorkerFacts, *, tls: bool) -> tuple[str, str]:
    if worker.speaks_tls and not tls:
        return (
            f"{worker.address} speaks TLS, and this process was given no CA",
            "Give tls_ca (and tls_cert with tls_key, if workers ask for certificates).",
        )
    if tls and not worker.speaks_tls:
        return (
            f"{worker.address} speaks no TLS, and this process was given a CA",
            "Give the worker tls_cert and tls_key, or take tls_ca away here.",
        )
    if tls:
        return (
            f"TLS with {worker.address} fails: {worker.health_error}",
            "See that its certificate comes from this CA, is valid today and bears the name in "
            "the address, and that our own certificate comes from the CA that it asks for.",
        )
    return (
        f"something listens at {worker.address}, but it does not answer as a worker: "
        f"{worker.health_error}",
        "See that the address is that of the gRPC port (9001 by default), not of the metrics port.",
    )


def _check_description(
    worker: WorkerFacts, description: worker_pb2.WorkerDescription, name: str
) -> Iterator[Finding]:
    role = ROLES.get(description.role, "unknown")
    if role != worker.listed:
        yield warn(
            f"{name}: role",
            f"{worker.address} is listed as a {worker.listed} worker and is a {role} worker",
            "Mend the list: it counts as what it says itself.",
        )
    yield ok(
        name,
        f"{description.worker_id}: {description.model}, digest "
        f"{description.model_digest.hex()[:8]}, KV by {'/'.join(description.transports) or 'none'}",
    )


def _check_metrics(worker: WorkerFacts, name: str) -> Iterator[Finding]:
    if worker.metrics_error:
        yield warn(
            f"{name}: metrics",
            f"its metrics can't be read: {worker.metrics_error}",
            "Give --metrics-port (0: don't look); see that a NetworkPolicy lets Prometheus and "
            "this pod in.",
        )
    yield from check_clock(name, worker.clock_skew_s)


def check_clock(name: str, skew_s: float | None) -> Iterator[Finding]:
    """Clocks agree."""
    if skew_s is not None and abs(skew_s) > MAX_SKEW_S:
        yield warn(
            f"{name}: clock",
            f"its clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} ours",
            "Run a time service (chrony, systemd-timesyncd) on both nodes.",
        )


def check_together(workers: Sequence[WorkerFacts]) -> Iterator[Finding]:
    """Workers can work with each other."""
    known = [(each.address, each.description) for each in workers if each.description is not None]
    if not known:
        return
    roles = Counter(ROLES.get(about.role, "unknown") for _, about in known)
    if not roles["prefill"] or not roles["decode"]:
        only, other = ("decode", "prefill") if roles["decode"] else ("prefill", "decode")
        yield warn(
            "pools",
            f"only {only} workers answer: each computes and generates alone",
            f"Start {other} workers, or give their addresses.",
        )
    yield _same(
        "digest",
        [(address, about.model_digest.hex()[:8]) for address, about in known],
        "KV is exchanged between equal digests only: give every worker the same model files, dtype "
        "and KV format.",
    )
    yield _same(
        "layout",
        [(address, _layout(about.layout)) for address, about in known],
        "KV is exchanged between equal layouts only: give every worker the same --block-size and "
        "dtype.",
    )
    yield _same(
        "version",
        [(address, about.version or "unknown") for address, about in known],
        "Finish the roll-out, or pin one image.",
        bad=warn,
    )
    yield from check_links(workers)


def check_links(workers: Sequence[WorkerFacts]) -> Iterator[Finding]:
    """Links were measured, and none is much slower than the others."""
    for worker in workers:
        for peer in worker.failing_links:
            message = "a test block did not come as it was sent: no KV moves"
            yield fail(f"link {peer} to {worker.address}", message, MEND_LINK)
    links = {
        (peer, worker.address): speed
        for worker in workers
        for peer, speed in worker.link_bytes_per_s.items()
        if speed
    }
    if not links:
        yield skip(
            "links",
            "no link between prefill and decode workers was measured yet, or no metrics were read",
        )
        return
    fastest = max(links.values())
    slow = {pair: speed for pair, speed in links.items() if speed < SLOW_LINK * fastest}
    for (peer, address), speed in slow.items():
        yield warn(
            f"link {peer} to {address}",
            f"{speed / 1e9:.2f} GB/s, where the fastest link has {fastest / 1e9:.2f} GB/s",
            "See whether its hosts have RDMA, and what transport its log names; UCX_LOG_LEVEL=info "
            "says why UCX chose it.",
        )
    if not slow:
        yield ok(
            "links",
            f"{len(links)} measured, {min(links.values()) / 1e9:.2f} to {fastest / 1e9:.2f} GB/s",
        )


def check_router(router: RouterFacts) -> Iterator[Finding]:
    """Everything about the router."""
    if router.error:
        if "CERTIFICATE_VERIFY_FAILED" in router.error:
            hint = "Say with --ca which CA its certificate comes from."
        else:
            hint = "See that its Service has endpoints (kubectl get endpointslices), and the port."
        yield fail("router", f"{router.url} can't be reached: {router.error}", hint)
        return
    if router.ready:
        yield ok("router", f"{router.url} admits requests")
    else:
        yield fail(
            "router",
            f"{router.url} admits no requests: {router.not_ready}",
            "See the workers below; it becomes ready with the first one that it reaches.",
        )
    yield from check_clock("router", router.clock_skew_s)
    if router.fleet_status in (401, 403):
        yield skip(
            "router: workers", "its list of workers needs an administrator's key (--api-key)"
        )
    elif router.attached:
        counts = ", ".join(f"{count} {role}" for role, count in router.attached.items())
        yield ok("router: workers", f"it uses {counts}")
    yield from _check_handovers(router)
    for address, cause in router.lost.items():
        yield fail(
            f"router: {address}",
            f"the router can't use {address}: {cause}",
            "Look at that worker from here, too: --prefill or --decode with its address.",
        )


def _check_handovers(router: RouterFacts) -> Iterator[Finding]:
    """KV moves between the pools, and prompts are handed over."""
    for (prefill, decode), cause in router.dark_links.items():
        yield fail(f"link {prefill} to {decode}", f"no KV moves: {cause}", MEND_LINK)
    if not all(router.attached.get(role) for role in ROLES.values()):
        return
    # What is short or cached is computed where it is generated, and says nothing.
    modes = [mode for mode in router.modes if mode != "local"]
    handed_over = modes.count("disaggregated")
    if not modes:
        yield skip("hand-overs", "no long prompt came of late: send one, and look again")
    elif modes[0] != "disaggregated":
        yield fail(
            "hand-overs",
            f"both pools have workers, and yet no KV moved for the latest prompt ({modes[0]})",
            "GET /v1/requests/{id}/explain says why each worker was refused, and /v1/requests has "
            "the ids.",
        )
    else:
        yield ok("hand-overs", f"{handed_over} of the latest {len(modes)} long prompts")


def _same(
    check: str,
    values: Sequence[tuple[str, str]],
    remedy: str,
    bad: Callable[[str, str, str], Finding] = fail,
) -> Finding:
    groups: dict[str, list[str]] = {}
    for address, value in values:
        groups.setdefault(value, []).append(address)
    if len(groups) == 1:
        return ok(check, f"the same on all {len(values)} workers: {values[0][1]}")
    shown = "; ".join(f"{value} on {', '.join(found)}" for value, found in groups.items())
    return bad(check, f"workers differ: {shown}", remedy)


def _layout(layout: worker_pb2.KvLayout) -> str:
    return (
        f"{layout.num_layers} layers, {layout.num_kv_heads} KV heads of {layout.head_dim}, "
        f"{layout.block_size} tokens of {layout.dtype} in {layout.block_bytes} bytes"
    )
