"""The router does what its OpenAPI document says."""

from typing import Any

import httpx
import jsonschema_rs
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
from tests.support.router_api import NoFleet, ScriptedGenerator, ScriptedView, byte_text, says

APP = create_app(
    generator=ScriptedGenerator(lambda _: says("ok")),
    fleet=NoFleet(),
    facts={},
    text=byte_text(),
    observed=ScriptedView(),
    settings=ApiSettings(),
    registry=CollectorRegistry(),
)
MESSAGES = [{"role": "user", "content": "a"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/generate": {"text": "a"},
    "/abort_request": {"rid": "a"},
    "/detokenize": {"tokens": [65]},
}
"""The least that each takes."""
VALUES: list[Any] = [None, True, 7, -1, 1.5, "", "auto", [], [1], ["a"], [{}], {}, {"type": "x"}]

schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@schema.parametrize()
@settings(
    max_examples=5,
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


async def test_a_value_that_the_document_does_not_allow_is_refused_by_name() -> None:
    """Field by field: with several at once one refusal would hide another."""
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(APP), base_url="http://test"
    ) as http:
        document = (await http.get("/openapi.json")).json()
        schemas = document["components"]["schemas"]
        refused = 0
        for path, least in BODIES.items():
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            name = body["schema"]["$ref"].rpartition("/")[2]
            assert (await http.post(path, json=least)).status_code == 200, path
            for field, allowed in schemas[name]["properties"].items():
                validator = jsonschema_rs.validator_for(
                    {**allowed, "components": {"schemas": schemas}}
                )
                for value in VALUES:
                    if validator.is_valid(value):
                        continue
                    answer = await http.post(path, json=least | {field: value})
                    assert answer.status_code == 400, (path, field, value, answer.text)
                    param = answer.json()["error"]["param"]
                    assert param.startswith(field), (path, field, value, answer.text)
                    refused += 1
        assert refused > 500
