"""Building blocks of the request bodies."""

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Strict(BaseModel):
    """A JSON object of which every field is known and nothing is converted."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def wrong(message: str) -> PydanticCustomError:
    """What a validator raises for a value of the wrong form."""
    return PydanticCustomError("wrong_value", "{message}", {"message": message})
