from typing import cast

import pytest

from core.errors import InvalidRequestError
from core.sampling import MAX_DEFINITION_BYTES, MAX_GRAMMAR_BYTES, StructuredOutput, StructureKind


@pytest.mark.parametrize(
    ("kind", "definition", "says"),
    [
        ("yaml", "{}", "must be one of json_object"),
        ("json_object", "{}", "takes no definition"),
        ("regex", "", "takes a definition"),
        ("ebnf", "é" * (MAX_GRAMMAR_BYTES // 2 + 1), "bytes long"),
        ("regex", "é" * (MAX_DEFINITION_BYTES // 2 + 1), "bytes long"),
    ],
)
def test_a_structure_that_makes_no_sense_is_refused(kind: str, definition: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        StructuredOutput(kind=cast(StructureKind, kind), definition=definition)
