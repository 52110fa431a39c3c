"""What a user can set on `diptych serve`: the cluster's own settings and every worker's.

A worker's setting is declared once, in `worker.settings`; here it is taken over as it is and passed
on to all workers. Settings of one part alone come through its environment variables.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from core.settings import Seconds
from worker.settings import WorkerSettings


class ServeSettings(BaseModel):
    """A router, prefill and decode workers on this machine, started together and kept running."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "demo", description="Folder in Hugging Face form, a .gguf file, or `demo` (SmolLM2-135M)."
    )
    served_model_name: str | None = Field(
        None, description="Name of the model in the API; default: the last part of `model`."
    )
    prefill: int = Field(1, ge=0, le=64, description="Number of prefill workers.")
    decode: int = Field(1, ge=0, le=64, description="Number of decode workers.")
    host: str = Field(
        "127.0.0.1", description="Address of the HTTP endpoint; workers stay on loopback."
    )
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    api_keys: str | None = Field(
        None,
        description="YAML file of the API keys that clients need, made by `diptych keys new`. "
        "Default: no keys are needed.",
    )
    http_tls_cert: str | None = Field(
        None, description="PEM file of the HTTP endpoint's certificate chain."
    )
    http_tls_key: str | None = Field(None, description="PEM file of that certificate's key.")
    console: bool = Field(True, description="Serve the page at /console.")
    ready_timeout_s: Seconds = Field(
        600.0, gt=0, description="Time that the workers have to load the model."
    )
    max_restarts: int = Field(
        5,
        ge=0,
        description="Give up when a process ended this many times in a row, each time within half "
        "a minute of its start.",
    )
    log_dir: str | None = Field(
        None, description="Folder of the log files; default: one per start in the state folder."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe messages in the log files."
    )
    console_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="Least severe messages of the processes to show here."
    )


CHOSEN_PER_PROCESS = frozenset(
    {
        *("host", "port", "advertise_host", "metrics_port", "worker_id", "log_format"),
        *("auth_token", "tls_cert", "tls_key", "tls_ca", "insecure"),
    }
)
"""Worker settings that the launcher decides itself."""

PASSED_ON = tuple(
    name
    for name in WorkerSettings.model_fields
    if name not in CHOSEN_PER_PROCESS and name not in ServeSettings.model_fields
)
"""Worker settings that a user may give to `diptych serve`."""


def serve_settings_class() -> type[ServeSettings]:
    """ServeSettings with the fields of PASSED_ON added."""
    fields: dict[str, Any] = {
        name: (field.rebuild_annotation(), field)
        for name, field in WorkerSettings.model_fields.items()
        if name in PASSED_ON
    }
    return create_model(
        "ServeSettings", __base__=ServeSettings, __doc__=ServeSettings.__doc__, **fields
    )


def worker_options(settings: ServeSettings) -> list[str]:
    """Command-line options for every worker: what the user set and nothing else."""
    values = settings.model_dump(mode="json", include=settings.model_fields_set & set(PASSED_ON))
    options = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{option}" if value else f"--no-{option}")
        else:
            options.append(f"--{option}={'none' if value is None else value}")
    return options
