"""The router does what its OpenAPI document says: schemathesis makes requests of it."""

import schemathesis
from hypothesis import HealthCheck, Phase, settings
from prometheus_client import CollectorRegistry
from schemathesis import checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from router.api.settings import ApiSettings
from router.app import create_app
from tests.support.router_api import NoFleet, ScriptedGenerator, byte_text, says

schema = schemathesis.openapi.from_asgi(
    "/openapi.json",
    create_app(
        generator=ScriptedGenerator(lambda _: says("ok")),
        fleet=NoFleet(),
        facts={},
        text=byte_text(),
        settings=ApiSettings(),
        registry=CollectorRegistry(),
    ),
)


@schema.parametrize()
@settings(
    max_examples=6,
    derandomize=True,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_router_keeps_to_its_document(case: schemathesis.Case) -> None:
    case.call_and_validate(
        checks=[
            checks.not_a_server_error,
            content_type_conformance,
            negative_data_rejection,
            response_headers_conformance,
            response_schema_conformance,
            status_code_conformance,
            unsupported_method,
        ]
    )
