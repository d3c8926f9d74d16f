"""TorchServe's inference service over gRPC, with its few messages encoded by hand.

TorchServe's package ships no stubs; the wire format is at https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc

from handlers.torchserve_server import TorchServe

_SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService"


def predictions(
    server: TorchServe,
    model: str,
    inputs: Mapping[str, bytes],
    *,
    version: str = "",
    token: bool = True,
) -> bytes:
    """Ask for one prediction, on a connection of its own; grpc.RpcError as the server raises it."""
    with _channel(server) as channel:
        call = channel.unary_unary(f"{_SERVICE}/Predictions")
        answer: bytes = call(
            _request(model, version, inputs), metadata=_metadata(server, token), timeout=60
        )
    return _prediction(answer)


def stream_predictions(
    server: TorchServe, model: str, inputs: Mapping[str, bytes], *, token: bool = True
) -> list[bytes]:
    """Ask for one prediction, and return the parts of its answer."""
    with _channel(server) as channel:
        call = channel.unary_stream(f"{_SERVICE}/StreamPredictions")
        parts = call(_request(model, "", inputs), metadata=_metadata(server, token), timeout=60)
        return [_prediction(part) for part in parts]


def _channel(server: TorchServe) -> grpc.Channel:
    return grpc.insecure_channel(f"127.0.0.1:{server.settings.grpc_inference_port}")


def _metadata(server: TorchServe, token: bool) -> list[tuple[str, str]]:
    headers = server.token_header() if token else {}
    return [(name.lower(), value) for name, value in headers.items()]


def _request(model: str, version: str, inputs: Mapping[str, bytes]) -> bytes:
    """PredictionsRequest: model_name = 1, model_version = 2, input = 3, a map of name to bytes."""
    entries = [_field(1, name.encode()) + _field(2, value) for name, value in inputs.items()]
    return b"".join(
        [
            _field(1, model.encode()),
            _field(2, version.encode()),
            *(_field(3, entry) for entry in entries),
        ]
    )


def _prediction(message: bytes) -> bytes:
    """PredictionResponse: prediction = 1, the only field that is read here."""
    if not message:
        return b""
    tag, message = _varint(message)
    assert tag == 1 << 3 | 2
    length, message = _varint(message)
    return message[:length]


def _field(number: int, content: bytes) -> bytes:
    """Encode bytes or a message, wire type 2."""
    return bytes([number << 3 | 2]) + _encoded(len(content)) + content


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _varint(message: bytes) -> tuple[int, bytes]:
    value = 0
    for place, byte in enumerate(message):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, message[place + 1 :]
    raise ValueError("a varint without an end")
