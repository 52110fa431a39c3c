"""The OpenAPI document of this router, made from its routes and the models of their bodies.

What it says of bodies is what the models check; tests hold a running router to it.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from router.api.exchange import Exchange

_REF = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_REQUEST_ID = {
    "description": "Id of the request, the client's own x-request-id if it sent one.",
    "schema": {"type": "string"},
}
_RAISED = {
    "400": "A field is wrong, unknown or not served; `param` names it.",
    "401": "The API key is missing or unknown.",
    "403": "The API key does not allow this.",
    "404": "There is no such model, response or request.",
    "408": "The body did not arrive in time.",
    "409": "It has ended already.",
    "413": "The body is too large.",
    "415": "The body is not JSON in UTF-8.",
    "429": "Too many requests; Retry-After says when to come back.",
    "431": "The headers are too large.",
    "500": "The router failed; its log says why.",
    "502": "A worker was lost, or KV could not be moved.",
    "503": "No worker can serve this now.",
    "504": "The deadline passed.",
}


class ApiRoute(Route):
    """A route that knows what to say of itself."""

    summary: str = ""
    bodies: Sequence[type[BaseModel]] = ()
    """Models of the body; several where it may be any of them."""
    produces: Sequence[str] = ("application/json",)
    """Media types of a good answer."""


class OpenApi:
    """GET /openapi.json."""

    def __init__(self, routes: Sequence[ApiRoute], *, version: str) -> None:
        self._routes = routes
        self._version = version
        self._json = b""

    async def __call__(self, exchange: Exchange) -> None:
        """The document; made when first asked for."""
        if not self._json:
            # Not by orjson, whose integers end at 64 bits, one below the bound of a seed.
            self._json = json.dumps(document(self._routes, version=self._version)).encode()
        await exchange.answer(self._json)


def document(routes: Sequence[ApiRoute], *, version: str) -> dict[str, Any]:
    """The document as JSON values."""
    models = {model: None for route in routes for model in route.bodies}
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    components: dict[str, Any] = {**schemas.get("$defs", {}), "Error": _ERROR}
    components = copy.deepcopy(components)  # schemas of fields are shared
    _let_null_mean_the_default(components)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            path = route.path.replace(":path}", "}")
            paths.setdefault(path, {})[method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Diptych",
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(route: ApiRoute) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in route.param_convertors
        ],
        "responses": {
            "200": {
                "description": "The answer.",
                "headers": {"x-request-id": _REQUEST_ID},
                "content": {media: {"schema": {}} for media in route.produces},
            },
            **{status: _error(description) for status, description in _RAISED.items()},
        },
    }
    if route.bodies:
        references = [_reference(model.__name__) for model in route.bodies]
        schema = references[0] if len(references) == 1 else {"anyOf": references}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _error(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "headers": {"x-request-id": _REQUEST_ID},
        "content": {"application/json": {"schema": _reference("Error")}},
    }


def _reference(model: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=model)}


def _let_null_mean_the_default(schema: Any) -> None:
    """In every object of ours an optional field may be null, which is as if it were left out."""
    if isinstance(schema, list):
        for each in schema:
            _let_null_mean_the_default(each)
    if not isinstance(schema, dict):
        return
    for each in schema.values():
        _let_null_mean_the_default(each)
    if schema.get("type") != "object" or schema.get("additionalProperties") is not False:
        return
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        if name not in required:
            apart = ("title", "description", "default")
            described = {key: field[key] for key in apart[:2] if key in field}
            whole = {key: value for key, value in field.items() if key not in apart}
            schema["properties"][name] = {**described, "anyOf": [whole, {"type": "null"}]}
