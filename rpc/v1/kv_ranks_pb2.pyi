from rpc.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankCommand(_message.Message):
    __slots__ = ("open", "connect", "read", "disconnect", "shut", "stamp")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CONNECT_FIELD_NUMBER: _ClassVar[int]
    READ_FIELD_NUMBER: _ClassVar[int]
    DISCONNECT_FIELD_NUMBER: _ClassVar[int]
    SHUT_FIELD_NUMBER: _ClassVar[int]
    STAMP_FIELD_NUMBER: _ClassVar[int]
    open: RankOpen
    connect: RankConnect
    read: RankRead
    disconnect: RankDisconnect
    shut: RankShut
    stamp: RankStamp
    def __init__(self, open: _Optional[_Union[RankOpen, _Mapping]] = ..., connect: _Optional[_Union[RankConnect, _Mapping]] = ..., read: _Optional[_Union[RankRead, _Mapping]] = ..., disconnect: _Optional[_Union[RankDisconnect, _Mapping]] = ..., shut: _Optional[_Union[RankShut, _Mapping]] = ..., stamp: _Optional[_Union[RankStamp, _Mapping]] = ...) -> None: ...

class RankOpen(_message.Message):
    __slots__ = ("layout", "size", "transport", "host", "token", "descriptor_bytes")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    layout: _worker_pb2.KvLayout
    size: int
    transport: str
    host: str
    token: str
    descriptor_bytes: int
    def __init__(self, layout: _Optional[_Union[_worker_pb2.KvLayout, _Mapping]] = ..., size: _Optional[int] = ..., transport: _Optional[str] = ..., host: _Optional[str] = ..., token: _Optional[str] = ..., descriptor_bytes: _Optional[int] = ...) -> None: ...

class RankConnect(_message.Message):
    __slots__ = ("peer_id", "layout", "rank_metadata")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    RANK_METADATA_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    layout: _worker_pb2.KvLayout
    rank_metadata: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, peer_id: _Optional[str] = ..., layout: _Optional[_Union[_worker_pb2.KvLayout, _Mapping]] = ..., rank_metadata: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RankRead(_message.Message):
    __slots__ = ("number", "peer_id", "remote_ids", "own_ids")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    REMOTE_IDS_FIELD_NUMBER: _ClassVar[int]
    OWN_IDS_FIELD_NUMBER: _ClassVar[int]
    number: int
    peer_id: str
    remote_ids: _containers.RepeatedScalarFieldContainer[int]
    own_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, number: _Optional[int] = ..., peer_id: _Optional[str] = ..., remote_ids: _Optional[_Iterable[int]] = ..., own_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RankDisconnect(_message.Message):
    __slots__ = ("number", "peer_id")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    number: int
    peer_id: str
    def __init__(self, number: _Optional[int] = ..., peer_id: _Optional[str] = ...) -> None: ...

class RankShut(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankStamp(_message.Message):
    __slots__ = ("number", "block_id", "name", "look")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    BLOCK_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOOK_FIELD_NUMBER: _ClassVar[int]
    number: int
    block_id: int
    name: str
    look: bool
    def __init__(self, number: _Optional[int] = ..., block_id: _Optional[int] = ..., name: _Optional[str] = ..., look: bool = ...) -> None: ...

class RankReport(_message.Message):
    __slots__ = ("opened", "read_ended", "disconnected", "shut", "stamped")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    READ_ENDED_FIELD_NUMBER: _ClassVar[int]
    DISCONNECTED_FIELD_NUMBER: _ClassVar[int]
    SHUT_FIELD_NUMBER: _ClassVar[int]
    STAMPED_FIELD_NUMBER: _ClassVar[int]
    opened: RankOpened
    read_ended: RankReadEnded
    disconnected: RankDisconnected
    shut: RankShutDone
    stamped: RankStamped
    def __init__(self, opened: _Optional[_Union[RankOpened, _Mapping]] = ..., read_ended: _Optional[_Union[RankReadEnded, _Mapping]] = ..., disconnected: _Optional[_Union[RankDisconnected, _Mapping]] = ..., shut: _Optional[_Union[RankShutDone, _Mapping]] = ..., stamped: _Optional[_Union[RankStamped, _Mapping]] = ...) -> None: ...

class RankOpened(_message.Message):
    __slots__ = ("metadata", "error")
    METADATA_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    metadata: bytes
    error: str
    def __init__(self, metadata: _Optional[bytes] = ..., error: _Optional[str] = ...) -> None: ...

class RankReadEnded(_message.Message):
    __slots__ = ("number", "error", "duration_s")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    number: int
    error: str
    duration_s: float
    def __init__(self, number: _Optional[int] = ..., error: _Optional[str] = ..., duration_s: _Optional[float] = ...) -> None: ...

class RankDisconnected(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class RankShutDone(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankStamped(_message.Message):
    __slots__ = ("number", "holds", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    holds: bool
    error: str
    def __init__(self, number: _Optional[int] = ..., holds: bool = ..., error: _Optional[str] = ...) -> None: ...
