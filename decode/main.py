"""Entry of a decode worker: its service process."""

from collections.abc import Sequence

from core.settings import load_or_exit, secret_values
from decode.links import DecodeExtension
from decode.settings import DecodeSettings
from telemetry.logs import setup
from worker.process import RoleProcesses, run_worker


def main(argv: Sequence[str]) -> int:
    """Run a decode worker until it is told to stop; returns the exit status."""
    settings = load_or_exit(
        DecodeSettings, argv, prog="diptych decode", env_prefix="DIPTYCH_DECODE_"
    )
    setup(settings.log_level, settings.log_format, "decode", secrets=secret_values(settings))
    role = RoleProcesses(
        name="decode",
        engine_module="decode.engine_process",
        build_extension=DecodeExtension,
    )
    return run_worker(settings, role)
