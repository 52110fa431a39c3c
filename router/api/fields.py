"""Building blocks of the request bodies."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """A JSON object of which every field is known and nothing is converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def wrong(message: str) -> PydanticCustomError:
    """What a validator raises for a value of the wrong form."""
    return PydanticCustomError("wrong_value", "{message}", {"message": message})


def at_most(count: int) -> BeforeValidator:
    """Bounds an object before its fields are looked at; `max_length` alone looks at all of them."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise wrong(f"takes at most {count} entries")
        return value

    return BeforeValidator(check)
