from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeMessage(_message.Message):
    __slots__ = ("hello", "frames", "end", "stopping")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    hello: NodeHello
    frames: bytes
    end: NodeEnd
    stopping: NodeStopping
    def __init__(self, hello: _Optional[_Union[NodeHello, _Mapping]] = ..., frames: _Optional[bytes] = ..., end: _Optional[_Union[NodeEnd, _Mapping]] = ..., stopping: _Optional[_Union[NodeStopping, _Mapping]] = ...) -> None: ...

class LeaderMessage(_message.Message):
    __slots__ = ("hello", "frames", "end")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    hello: LeaderHello
    frames: bytes
    end: NodeEnd
    def __init__(self, hello: _Optional[_Union[LeaderHello, _Mapping]] = ..., frames: _Optional[bytes] = ..., end: _Optional[_Union[NodeEnd, _Mapping]] = ...) -> None: ...

class NodeHello(_message.Message):
    __slots__ = ("node_rank", "host", "agreed")
    class AgreedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NODE_RANK_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    AGREED_FIELD_NUMBER: _ClassVar[int]
    node_rank: int
    host: str
    agreed: _containers.ScalarMap[str, str]
    def __init__(self, node_rank: _Optional[int] = ..., host: _Optional[str] = ..., agreed: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LeaderHello(_message.Message):
    __slots__ = ("rendezvous_port", "rendezvous_name", "silence_ms")
    RENDEZVOUS_PORT_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_NAME_FIELD_NUMBER: _ClassVar[int]
    SILENCE_MS_FIELD_NUMBER: _ClassVar[int]
    rendezvous_port: int
    rendezvous_name: str
    silence_ms: int
    def __init__(self, rendezvous_port: _Optional[int] = ..., rendezvous_name: _Optional[str] = ..., silence_ms: _Optional[int] = ...) -> None: ...

class NodeEnd(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class NodeStopping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
