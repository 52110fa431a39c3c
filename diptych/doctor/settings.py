"""What a user can say to `diptych doctor`."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from core.settings import Seconds
from router.settings import Address

PARTS = ("ROUTER", "PREFILL", "DECODE")


class DoctorSettings(BaseModel):
    """Check a deployment from inside one of its pods, or from elsewhere.

    What is not given is taken from the environment of the router or worker whose pod this is, such
    as DIPTYCH_DECODE_AUTH_TOKEN.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["auto", "worker", "router", "elsewhere"] = Field(
        "auto",
        description="What runs here: worker also looks for torch, GPUs and RDMA; auto: a worker "
        "where the environment has one's settings, or torch is installed.",
    )
    router: str | None = Field(None, description="URL of the router, such as http://router:8000.")
    prefill: tuple[Address, ...] | None = Field(
        None, description="host:port of prefill workers; a name may stand for several."
    )
    decode: tuple[Address, ...] | None = Field(None, description="The same of decode workers.")
    auth_token: SecretStr | None = Field(None, description="Token of the workers' gRPC ports.")
    api_key: SecretStr | None = Field(
        None, description="Key for the router, if it asks for one; an administrator's shows more."
    )
    ca: str | None = Field(
        None,
        description="PEM file of the CA that the router's certificate must come from; default: "
        "those that this machine trusts.",
    )
    tls_ca: str | None = Field(
        None, description="PEM file of the CA that workers' certificates must come from."
    )
    tls_cert: str | None = Field(None, description="PEM file of a certificate of our own.")
    tls_key: str | None = Field(None, description="PEM file of the certificate's key.")
    metrics_port: int = Field(
        9101, ge=0, le=65535, description="Metrics port of the workers; 0: not looked at."
    )
    model: str | None = Field(None, description="Model whose files must be readable here.")
    free_ports: tuple[int, ...] = Field(
        (), description="Ports that must be free here, for what is to be started."
    )
    timeout_s: Seconds = Field(5.0, gt=0, description="Longest wait for one answer.")
    json_: bool = Field(False, description="Print JSON.")


def inherited(settings: DoctorSettings, environment: Mapping[str, str]) -> DoctorSettings:
    """Fill in what is not given from the settings of the process whose pod this is."""
    names = ("prefill", "decode", "auth_token", "tls_ca", "tls_cert", "tls_key", "model")
    found: dict[str, Any] = {}
    for name in names:
        if getattr(settings, name) is not None:
            continue
        values = [environment.get(f"DIPTYCH_{part}_{name.upper()}", "") for part in PARTS]
        value = next(filter(None, values), None)
        if value is not None:
            found[name] = value.split(",") if name in ("prefill", "decode") else value
    return DoctorSettings.model_validate(settings.model_dump(exclude_unset=True) | found)


def is_worker(role: str, environment: Mapping[str, str] = os.environ) -> bool:
    """True if a worker runs here, or could."""
    if role != "auto":
        return role == "worker"
    if any(name.startswith(("DIPTYCH_PREFILL_", "DIPTYCH_DECODE_")) for name in environment):
        return True
    if any(name.startswith("DIPTYCH_ROUTER_") for name in environment):
        return False
    from importlib.util import find_spec

    return find_spec("torch") is not None
