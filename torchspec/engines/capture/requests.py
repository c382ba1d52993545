"""What a request asks of the connector, and what the connector says when it is done.

An *order* travels with the request (``kv_transfer_params["torchspec"]``, plain JSON values), so one running vLLM serves any run that knows its token.
The *report* comes back on a TCP connection that the connector opens to the address in the order: vLLM's own answer leaves before the record is written.
"""

from __future__ import annotations

import hmac
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import msgspec
import xxhash

from torchspec.engines.messages import Message
from torchspec.transfer.spec import ITEMSIZE, RecordSpec
from torchspec.transfer.store import Address

PARAMETER = "torchspec"
"""Key of the order in ``kv_transfer_params`` of a request, and of the answer in those of its output."""
TOKEN_VARIABLE = "TORCHSPEC_TOKEN"
"""Environment variable with the secret that both sides must share."""

REPORTER = "connector"
"""Role and name under which a connector proves the secret; a coordinator knows no such role."""


class BadCaptureRequest(Exception):
    """An order that must not be followed."""


@dataclass(frozen=True)
class CaptureRequest:
    """One record to write."""

    key: str
    """Of the record in the store; unique for each attempt."""
    tail: list[int]
    """Token ids of the conversation after those of the prompt: no state is needed at the last one, so it is not computed."""
    answer: bool
    """What the target says to the prompt belongs to the conversation (then there is no tail)."""
    ids: str
    """Of a conversation with images: ``ids_digest`` of its ids, which vLLM is to come to from the one token that it is given for each image. Else ""."""
    prompt: int
    """Tokens of the prompt; for images, of what they are expanded to as well."""
    run: dict[str, Any]
    """Store address, record spec, and where to report: the same for all orders of an engine (see :func:`read_destination`)."""
    proof: str = ""
    """:meth:`proof_of` all the rest: requests are logged, so the secret itself is not in them, and a logged order is worth nothing with a field changed."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def proof_of(self, token: str) -> str:
        """HMAC-SHA256 under the shared secret, in hexadecimal, of every other field, as JSON with sorted keys and no spaces."""
        plain = {name: value for name, value in self.to_dict().items() if name != "proof"}
        return hmac.new(token.encode(), json.dumps(plain, sort_keys=True, separators=(",", ":")).encode(), "sha256").hexdigest()

    def signed(self, token: str) -> CaptureRequest:
        """This order with its proof."""
        return replace(self, proof=self.proof_of(token))


def ids_digest(ids: Sequence[int]) -> str:
    """XXH3-128 of token ids as little-endian int32, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(struct.pack(f"<{len(ids)}i", *ids))


@dataclass(frozen=True)
class Destination:
    """Where the records of an engine go."""

    store: Address
    spec: RecordSpec
    report: tuple[str, int]
    """Host and port of the engine's :class:`~torchspec.engines.capture.reports.ReportServer`."""
    alone: bool = False
    """``engine.deterministic``: a request must not share a step of vLLM with another one."""

    def to_dict(self) -> dict[str, Any]:
        return {"store": self.store, "record": self.spec.to_dict(), "report": list(self.report), "alone": self.alone}


def read_request(plain: Any) -> CaptureRequest:
    """The order in a request's parameters.

    Raises:
        BadCaptureRequest: it is malformed, or was not made with this process's secret.
    """
    if not isinstance(plain, Mapping) or set(plain) != {f.name for f in fields(CaptureRequest)}:
        raise BadCaptureRequest("the order is malformed")
    try:
        order = msgspec.convert(dict(plain), CaptureRequest)
    except msgspec.ValidationError as error:
        raise BadCaptureRequest(f"the order is malformed ({error})") from error
    if order.prompt < 1 or len(order.tail) > (0 if order.answer else 1):
        raise BadCaptureRequest(f"the order is malformed ({len(order.tail)} tokens after the prompt)")
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token or not hmac.compare_digest(order.proof.encode(), order.proof_of(token).encode()):
        raise BadCaptureRequest(f"the order was changed, or its token is not the one that this server was started with ({TOKEN_VARIABLE})")
    return order


def read_destination(run: Mapping[str, Any]) -> Destination:
    """Where an order's record goes.

    Raises:
        BadCaptureRequest: the description is malformed.
    """
    try:
        host, port = run["report"]
        destination = Destination(dict(run["store"]), RecordSpec.from_dict(run["record"]), (str(host), int(port)), bool(run["alone"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadCaptureRequest(f"the order's run is malformed ({type(error).__name__}: {error})") from error
    if destination.spec.dtype not in ITEMSIZE or not 0 < destination.report[1] < 65536:
        raise BadCaptureRequest(f"the order's run is malformed (dtype {destination.spec.dtype!r}, port {destination.report[1]})")
    return destination


class Introduce(Message, frozen=True, kw_only=True):
    """A connector's answer to the challenge of the engine it reports to."""

    proof: bytes
    """``handshake.prove`` of the secret, the challenge, and role and name ``REPORTER``: the secret itself is sent to nobody."""
