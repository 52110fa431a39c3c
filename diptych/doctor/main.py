"""`diptych doctor`: gathers facts, runs every check, prints findings; 1 if something fails."""

import asyncio
import json
import os
import ssl
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from core.errors import ConfigError
from core.settings import load_or_exit
from diptych.chat.client import trusted
from diptych.doctor.finding import Finding, Level
from diptych.doctor.host import look_at_host
from diptych.doctor.host_checks import check_host
from diptych.doctor.peer_checks import check_router, check_together, check_worker
from diptych.doctor.peers import RouterFacts, Ways, WorkerFacts, look_at_router, look_at_workers
from diptych.doctor.settings import DoctorSettings, inherited, is_worker
from rpc.auth import Credentials

STYLES = {Level.OK: "green", Level.SKIP: "dim", Level.WARN: "yellow", Level.FAIL: "bold red"}


def main(argv: Sequence[str]) -> int:
    """Check and print; returns the exit status: 1 if a check failed, 2 for wrong settings."""
    settings = load_or_exit(
        DoctorSettings, argv, prog="diptych doctor", env_prefix="DIPTYCH_DOCTOR_"
    )
    try:
        settings = inherited(settings, os.environ)
        credentials, trust = credentials_of(settings), trusted(settings.ca)
    except (ConfigError, ValueError) as error:
        print(f"diptych doctor: {error}", file=sys.stderr)
        return 2
    worker = is_worker(settings.role)
    facts = look_at_host(settings.model, settings.free_ports, packages=worker)
    findings = list(check_host(facts, worker=worker))
    findings += asyncio.run(look_at_peers(settings, credentials, trust))
    if settings.json_:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        show(findings, Console(soft_wrap=True, highlight=False))
    return int(any(finding.level is Level.FAIL for finding in findings))


def credentials_of(settings: DoctorSettings) -> Credentials:
    """What the doctor proves itself with.

    Raises:
        ConfigError: a file is missing, or the token is none.
    """
    token = settings.auth_token
    return Credentials.from_settings(
        token=token.get_secret_value() if token else None,
        ca=settings.tls_ca,
        cert=settings.tls_cert,
        key=settings.tls_key,
    )


async def look_at_peers(
    settings: DoctorSettings, credentials: Credentials, trust: ssl.SSLContext | None = None
) -> list[Finding]:
    """Findings about the router, which `trust` judges by TLS, and every worker that is named."""
    listed = dict.fromkeys(settings.prefill or (), "prefill")
    listed |= dict.fromkeys(settings.decode or (), "decode")
    ways = Ways(
        credentials=credentials, timeout_s=settings.timeout_s, metrics_port=settings.metrics_port
    )
    workers = await look_at_workers(listed, ways)
    router = None
    if settings.router is not None:
        key = settings.api_key.get_secret_value() if settings.api_key else None
        router = await look_at_router(settings.router, key, settings.timeout_s, trust)
    return list(_judge(router, workers, credentials))


def _judge(
    router: RouterFacts | None, workers: Sequence[WorkerFacts], credentials: Credentials
) -> Iterator[Finding]:
    if router is not None:
        yield from check_router(router)
    for worker in workers:
        yield from check_worker(
            worker, token=credentials.token is not None, tls=credentials.ca is not None
        )
    yield from check_together(workers)


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print one line for each finding, and below it what to do."""
    for finding in findings:
        line = Text(f"{finding.level.upper():<5}", style=STYLES[finding.level])
        line.append(f" {finding.check}: ", style="bold")
        line.append(finding.message, style="default")
        console.print(line)
        if finding.remedy:
            console.print(Text(f"      {finding.remedy}"))
    counts = {level: sum(each.level is level for each in findings) for level in Level}
    console.print(
        f"\n{counts[Level.FAIL]} failed, {counts[Level.WARN]} warnings, {counts[Level.OK]} ok, "
        f"{counts[Level.SKIP]} not looked at."
    )
