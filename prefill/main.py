"""Entry of a prefill worker: its service process."""

from collections.abc import Sequence

from core.settings import load_or_exit, secret_values
from prefill.service import PrefillExtension
from prefill.settings import PrefillSettings
from telemetry.logs import setup
from worker.process import RoleProcesses, run_worker


def main(argv: Sequence[str]) -> int:
    """Run a prefill worker until it is told to stop; returns the exit status."""
    settings = load_or_exit(
        PrefillSettings, argv, prog="diptych prefill", env_prefix="DIPTYCH_PREFILL_"
    )
    setup(settings.log_level, settings.log_format, "prefill", secrets=secret_values(settings))
    role = RoleProcesses(
        name="prefill",
        engine_module="prefill.engine_process",
        build_extension=PrefillExtension,
        services=["diptych.v1.KvExport"],
    )
    return run_worker(settings, role)
