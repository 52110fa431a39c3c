"""Random protobuf messages: every field of every depth, with values that are likely to matter."""

from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

M = TypeVar("M", bound=Message)
_NUMBERS = [0, 1, 2, 3, 4, 5, 7, 9, 16, 96, 97, 1000, 2**16, 2**31 - 1]
_NAMES = ["", "r", "s", "prefill", "decode", "local", "json_object", "x" * 300, "🜁"]
_BYTES = [b"", b"\x00" * 16, b"x" * 15, b"x" * 32, b"digest"]


def messages(kind: type[M]) -> st.SearchStrategy[M]:
    """Messages of one kind."""
    return _values(kind.DESCRIPTOR).map(lambda values: kind(**values))


def _values(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of a message's constructor; of a oneof at most one field."""
    groups: list[st.SearchStrategy[dict[str, Any]]] = []
    for oneof in descriptor.oneofs:
        alternatives = [_field(field, depth).map(_named(field.name)) for field in oneof.fields]
        groups.append(
            st.one_of([*alternatives, *([st.just({})] if len(alternatives) == 1 else [])])
        )
    groups += [
        st.one_of(_field(field, depth).map(_named(field.name)), st.just({}))
        for field in descriptor.fields
        if field.containing_oneof is None
    ]
    return st.tuples(*groups).map(lambda parts: {k: v for part in parts for k, v in part.items()})


def _named(name: str) -> Any:
    return lambda value: {name: value}


def _field(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return st.dictionaries(_field(key, depth), _field(value, depth), max_size=2)
    one = _one(field, depth)
    return st.lists(one, max_size=6) if field.is_repeated else one


def _one(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    kinds = FieldDescriptor
    match field.cpp_type:
        case kinds.CPPTYPE_MESSAGE:
            return _values(field.message_type, depth + 1)
        case kinds.CPPTYPE_STRING if field.type == kinds.TYPE_BYTES:
            return st.sampled_from(_BYTES) | st.binary(max_size=40)
        case kinds.CPPTYPE_STRING:
            return st.sampled_from(_NAMES) | st.text(max_size=5)
        case kinds.CPPTYPE_BOOL:
            return st.booleans()
        case kinds.CPPTYPE_DOUBLE | kinds.CPPTYPE_FLOAT:
            return st.sampled_from([0.0, 1.0, 0.5, -1.0, 1e300]) | st.floats()
        case kinds.CPPTYPE_ENUM:
            return st.sampled_from([value.number for value in field.enum_type.values] + [99])
        case kinds.CPPTYPE_UINT64 | kinds.CPPTYPE_INT64:
            return st.sampled_from([*_NUMBERS, 2**63 - 1])
        case _:
            return st.sampled_from(_NUMBERS)
