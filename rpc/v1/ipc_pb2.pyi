from rpc.v1 import kv_export_pb2 as _kv_export_pb2
from rpc.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineCommand(_message.Message):
    __slots__ = ("router", "decode", "prefill", "closed", "call", "stop", "start")
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    router: RouterFrame
    decode: DecodeFrame
    prefill: PrefillFrame
    closed: ChannelClosed
    call: AdminCall
    stop: Stop
    start: Start
    def __init__(self, router: _Optional[_Union[RouterFrame, _Mapping]] = ..., decode: _Optional[_Union[DecodeFrame, _Mapping]] = ..., prefill: _Optional[_Union[PrefillFrame, _Mapping]] = ..., closed: _Optional[_Union[ChannelClosed, _Mapping]] = ..., call: _Optional[_Union[AdminCall, _Mapping]] = ..., stop: _Optional[_Union[Stop, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ...) -> None: ...

class EngineEvent(_message.Message):
    __slots__ = ("ready", "worker", "prefill", "decode", "open", "close", "reply", "heartbeat", "failed", "progress")
    READY_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ready: Ready
    worker: WorkerFrame
    prefill: PrefillFrame
    decode: DecodeFrame
    open: OpenLink
    close: CloseChannel
    reply: AdminReply
    heartbeat: Heartbeat
    failed: StartupFailed
    progress: StartupProgress
    def __init__(self, ready: _Optional[_Union[Ready, _Mapping]] = ..., worker: _Optional[_Union[WorkerFrame, _Mapping]] = ..., prefill: _Optional[_Union[PrefillFrame, _Mapping]] = ..., decode: _Optional[_Union[DecodeFrame, _Mapping]] = ..., open: _Optional[_Union[OpenLink, _Mapping]] = ..., close: _Optional[_Union[CloseChannel, _Mapping]] = ..., reply: _Optional[_Union[AdminReply, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., failed: _Optional[_Union[StartupFailed, _Mapping]] = ..., progress: _Optional[_Union[StartupProgress, _Mapping]] = ...) -> None: ...

class RouterFrame(_message.Message):
    __slots__ = ("channel", "message")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    channel: int
    message: _worker_pb2.RouterMessage
    def __init__(self, channel: _Optional[int] = ..., message: _Optional[_Union[_worker_pb2.RouterMessage, _Mapping]] = ...) -> None: ...

class WorkerFrame(_message.Message):
    __slots__ = ("channel", "message")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    channel: int
    message: _worker_pb2.WorkerMessage
    def __init__(self, channel: _Optional[int] = ..., message: _Optional[_Union[_worker_pb2.WorkerMessage, _Mapping]] = ...) -> None: ...

class DecodeFrame(_message.Message):
    __slots__ = ("channel", "message")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    channel: int
    message: _kv_export_pb2.DecodeMessage
    def __init__(self, channel: _Optional[int] = ..., message: _Optional[_Union[_kv_export_pb2.DecodeMessage, _Mapping]] = ...) -> None: ...

class PrefillFrame(_message.Message):
    __slots__ = ("channel", "message")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    channel: int
    message: _kv_export_pb2.PrefillMessage
    def __init__(self, channel: _Optional[int] = ..., message: _Optional[_Union[_kv_export_pb2.PrefillMessage, _Mapping]] = ...) -> None: ...

class ChannelClosed(_message.Message):
    __slots__ = ("channel", "reason")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    channel: int
    reason: str
    def __init__(self, channel: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class CloseChannel(_message.Message):
    __slots__ = ("channel", "reason")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    channel: int
    reason: str
    def __init__(self, channel: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class OpenLink(_message.Message):
    __slots__ = ("channel", "address")
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    channel: int
    address: str
    def __init__(self, channel: _Optional[int] = ..., address: _Optional[str] = ...) -> None: ...

class AdminCall(_message.Message):
    __slots__ = ("id", "drain", "flush_cache")
    ID_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    FLUSH_CACHE_FIELD_NUMBER: _ClassVar[int]
    id: int
    drain: _worker_pb2.DrainRequest
    flush_cache: _worker_pb2.FlushCacheRequest
    def __init__(self, id: _Optional[int] = ..., drain: _Optional[_Union[_worker_pb2.DrainRequest, _Mapping]] = ..., flush_cache: _Optional[_Union[_worker_pb2.FlushCacheRequest, _Mapping]] = ...) -> None: ...

class AdminReply(_message.Message):
    __slots__ = ("id", "drain", "flush_cache")
    ID_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    FLUSH_CACHE_FIELD_NUMBER: _ClassVar[int]
    id: int
    drain: _worker_pb2.DrainResponse
    flush_cache: _worker_pb2.FlushCacheResponse
    def __init__(self, id: _Optional[int] = ..., drain: _Optional[_Union[_worker_pb2.DrainResponse, _Mapping]] = ..., flush_cache: _Optional[_Union[_worker_pb2.FlushCacheResponse, _Mapping]] = ...) -> None: ...

class Stop(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Start(_message.Message):
    __slots__ = ("settings_json", "nodes")
    SETTINGS_JSON_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    settings_json: bytes
    nodes: OtherNodes
    def __init__(self, settings_json: _Optional[bytes] = ..., nodes: _Optional[_Union[OtherNodes, _Mapping]] = ...) -> None: ...

class OtherNodes(_message.Message):
    __slots__ = ("pipe_fds", "listen_fd", "rendezvous_port", "rendezvous_name")
    PIPE_FDS_FIELD_NUMBER: _ClassVar[int]
    LISTEN_FD_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_PORT_FIELD_NUMBER: _ClassVar[int]
    RENDEZVOUS_NAME_FIELD_NUMBER: _ClassVar[int]
    pipe_fds: _containers.RepeatedScalarFieldContainer[int]
    listen_fd: int
    rendezvous_port: int
    rendezvous_name: str
    def __init__(self, pipe_fds: _Optional[_Iterable[int]] = ..., listen_fd: _Optional[int] = ..., rendezvous_port: _Optional[int] = ..., rendezvous_name: _Optional[str] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: _worker_pb2.WorkerDescription
    def __init__(self, worker: _Optional[_Union[_worker_pb2.WorkerDescription, _Mapping]] = ...) -> None: ...

class StartupProgress(_message.Message):
    __slots__ = ("stage",)
    STAGE_FIELD_NUMBER: _ClassVar[int]
    stage: str
    def __init__(self, stage: _Optional[str] = ...) -> None: ...

class StartupFailed(_message.Message):
    __slots__ = ("error_code", "error_message")
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    error_code: str
    error_message: str
    def __init__(self, error_code: _Optional[str] = ..., error_message: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("load", "metrics")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    load: _worker_pb2.LoadReport
    metrics: bytes
    def __init__(self, load: _Optional[_Union[_worker_pb2.LoadReport, _Mapping]] = ..., metrics: _Optional[bytes] = ...) -> None: ...
