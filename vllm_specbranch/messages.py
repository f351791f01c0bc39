"""The wire between the engine and the draft server: what a message is, how it becomes bytes, which bytes are refused.

Owns the message structs, the protocol version and the limits. Does not own sockets, timeouts or queues (`transport`),
nor what a message means to the token tree (`draft_server`). Runs in both processes: the target worker encodes engine
messages and decodes server messages, the draft server does the opposite.

    one message on the wire:   | version, 1 byte | msgpack array: ["CommitBatch", round, max_wait_ms, [...]] |

Decoding is strict: a wrong type, a number out of range, an array that is too long or too short, trailing bytes or a
message of the other direction raise `WireError`, and nothing else is ever raised. Building a struct does not validate
it; the receiver does, because only the receiver must survive what the other side sends.
"""

from typing import Annotated, TypeVar

import msgspec

from vllm_specbranch.errors import VersionError, WireError

PROTOCOL_VERSION = 4
MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # 3.3 million tokens at msgpack's 5 bytes each; includes the version byte.
MAX_ENTRIES = 4096  # Requests named in one list of a message; four times vLLM's largest default of max_num_seqs.
MAX_ID_LENGTH = 256  # Characters of a request id or session name.
MAX_CHUNK = 64  # Draft tokens of one request, as in the settings.
MAX_TOP_M = 1024  # Entries of one draft distribution, as in the settings.

_MAX_INT32 = 2**31 - 1  # Token ids and positions become int32 tensors.
_MAX_INT64 = 2**63 - 1
_MAX_US = 1e15  # Thirty years in microseconds: any finite bound shuts out infinity.
_MAX_REASON_LENGTH = 200  # Of a decoding error, in characters: it may quote what the peer sent.

Token = Annotated[int, msgspec.Meta(ge=0, le=_MAX_INT32)]
Position = Annotated[int, msgspec.Meta(ge=0, le=_MAX_INT32)]
Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX_INT64)]
Size = Annotated[int, msgspec.Meta(ge=1, le=_MAX_INT32)]
DurationMs = Annotated[float, msgspec.Meta(ge=0.0, le=60_000.0)]
SomeTokens = Annotated[list[Token], msgspec.Meta(min_length=1)]
TokensOfARound = Annotated[list[Token], msgspec.Meta(min_length=1, max_length=MAX_CHUNK + 1)]
Identifier = Annotated[str, msgspec.Meta(max_length=MAX_ID_LENGTH)]
# As in vLLM, which is greedy below; a logit divided by much less is no number any more.
Temperature = Annotated[float, msgspec.Meta(ge=1e-5, le=2.0)]
TopM = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOP_M)]
Packed = Annotated[bytes, msgspec.Meta(max_length=4 * MAX_CHUNK * MAX_TOP_M)]  # Four-byte numbers, little-endian.
DurationUs = Annotated[float, msgspec.Meta(ge=0.0, le=_MAX_US)]
ChunkLimit = Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNK)]
LengthClass = Annotated[int, msgspec.Meta(ge=0, le=2)]
TopProbs = Annotated[list[Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]], msgspec.Meta(max_length=MAX_CHUNK)]


class _Wire(msgspec.Struct, array_like=True, tag=True, frozen=True, forbid_unknown_fields=True):
    """Base of everything on the wire: an array that starts with the name of its type and has one entry per field."""


class Sampling(_Wire, frozen=True):
    """How the drafts of a request are drawn (section 3 of the design, rules 1, 2 and 6).

    Args:
        temperature: of the draft's softmax.
        top_m: how many of its most likely tokens the draft's distribution is truncated to before it is renormalised.
        key: names the request's stream of random numbers; independent of the target's.
    """

    temperature: Temperature
    top_m: TopM
    key: Count


class Open(_Wire, frozen=True):
    """Start drafting for a request.

    Args:
        request_id: the engine's id of the request.
        tokens: all committed tokens so far, prompt first.
        sampling: None for greedy drafts.
    """

    request_id: Identifier
    tokens: SomeTokens
    sampling: Sampling | None


class Commit(_Wire, frozen=True):
    """What one round of verification decided for one request.

    Args:
        request_id: the engine's id of the request.
        position: absolute index of `tokens[0]` in the sequence.
        tokens: the accepted draft tokens followed by the token that the target sampled.
        num_draft_tokens: how many draft tokens the round verified; fewer than were sent when the scheduler cut them or a
            reply came too late.
        head_class: what the length head says of the next draft (section 5 of the design): 0 rejected at once, 1 in between, 2 all
            accepted. None where there is no head. A function of the committed tokens alone.
    """

    request_id: Identifier
    position: Position
    tokens: TokensOfARound
    num_draft_tokens: Count
    head_class: LengthClass | None


class Draft(_Wire, frozen=True):
    """The next chunk for one request.

    Args:
        request_id: the engine's id of the request.
        position: absolute index of `tokens[0]`, which is the number of committed tokens.
        tokens: draft tokens, possibly none.
        hit: whether the commit stayed within what had been drafted ahead.
        q_ids: `[num_tokens, m]` int32 token ids, row-major: the support of the distribution that each token was drawn from.
            Empty for greedy drafts, which have none.
        q_probs: `[num_tokens, m]` float32, the probabilities of those ids.
        top_probs: `[num_tokens]`, the draft's top probability where each token was drawn; empty unless `Hello` asked for it.
    """

    request_id: Identifier
    position: Position
    tokens: list[Token]
    hit: bool
    q_ids: Packed
    q_probs: Packed
    top_probs: TopProbs


class Terms(_Wire, frozen=True):
    """What an engine expects of a draft server that it did not start itself.

    Args:
        model_identity: of the draft model that the engine was configured with (`draft_identity`); empty if it is not known there.
        dtype: of the draft model's weights, by torch's name.
        num_speculative_tokens: most draft tokens of a chunk that the engine takes.
    """

    model_identity: Identifier
    dtype: Identifier
    num_speculative_tokens: ChunkLimit


Opens = Annotated[list[Open], msgspec.Meta(max_length=MAX_ENTRIES)]
Commits = Annotated[list[Commit], msgspec.Meta(max_length=MAX_ENTRIES)]
Drafts = Annotated[list[Draft], msgspec.Meta(max_length=MAX_ENTRIES)]
RequestIds = Annotated[list[Identifier], msgspec.Meta(max_length=MAX_ENTRIES)]


class Hello(_Wire, frozen=True):
    """Engine to server, first message of a session; answered by `Ready`.

    Args:
        session: names this life of the engine's connection; echoed by `Ready`.
        vocab_size: of the target model.
        max_model_len: of the target model, in tokens.
        wants_top_probs: whether the drafts of this session are to carry `top_probs`.
        terms: checked by a server that several engines share; None from the engine that started the server.
    """

    session: Identifier
    vocab_size: Size
    max_model_len: Size
    wants_top_probs: bool
    terms: Terms | None


class StepBegin(_Wire, frozen=True):
    """Engine to server, when an engine step starts: requests that are new and requests that are gone.

    Args:
        opens: new requests.
        closes: ids of finished and aborted requests.
    """

    opens: Opens
    closes: RequestIds


class Pace(_Wire, frozen=True):
    """Times of the engine, so that the server can weigh what a longer chunk or a wait costs.

    Args:
        num_tokens: that the target's forward was given in this step, all requests together.
        step_us: how long that forward and sampling took.
        slack_us: how long after this message the engine is going to look for the reply.
    """

    num_tokens: Count
    step_us: DurationUs
    slack_us: DurationUs


class CommitBatch(_Wire, frozen=True):
    """Engine to server, after sampling: the outcomes of one round. Answered by one `DraftBatch` of the same round.

    Args:
        round: number of the round; the reply repeats it.
        max_wait_ms: how long the server may delay the reply to draft more first; 0 asks for a reply at once.
        commits: one entry per request that got tokens.
        pace: measured times of the engine; None for a step with a prefill, which says nothing about verification.
    """

    round: Count
    max_wait_ms: DurationMs
    commits: Commits
    pace: Pace | None


class StatusQuery(_Wire, frozen=True):
    """Engine to server: asks for a `Status` with the same `query` number."""

    query: Count


class Shutdown(_Wire, frozen=True):
    """Engine to server: leave the serving loop. Not answered."""


class Ready(_Wire, frozen=True):
    """Server to engine: the answer to `Hello`.

    Args:
        session: the session of the `Hello` answered.
        max_model_len: longest sequence the server can draft for, in tokens.
        num_blocks: KV blocks of the draft model's cache.
        block_size: tokens per KV block.
    """

    session: Identifier
    max_model_len: Size
    num_blocks: Size
    block_size: Size


class Refused(_Wire, frozen=True):
    """Server to engine: the other answer to `Hello`: this server does not draft for this engine.

    Args:
        session: the session of the `Hello` answered.
        reason: why.
        is_final: the two do not fit together; otherwise the server is full or about to end, and a later try may succeed.
    """

    session: Identifier
    reason: str
    is_final: bool


class Farewell(_Wire, frozen=True):
    """Server to engine: there is no session (any more), and no reply will come. The engine may say `Hello` again.

    Args:
        reason: why.
    """

    reason: str


class Report(_Wire, frozen=True):
    """How the draft server stands, for the engine's metrics; rides on its replies, so nothing is asked and nothing waits for it.

    Args:
        life: names what these counters belong to, a life of the server or of the connection; another one begins at 0.
        num_requests: open requests of the engine that is answered.
        num_queued_rows: rows, and prefills, that the server would draft and left for later when it last chose among all requests.
        num_blocks_held: KV blocks in use by the engine that is answered.
        num_blocks: KV blocks in all.
        counters: event counts of this life: of the engine's own requests, and of what happened to the server in that time.
    """

    life: Count
    num_requests: Count
    num_queued_rows: Count
    num_blocks_held: Count
    num_blocks: Count
    counters: dict[str, Count]


class DraftBatch(_Wire, frozen=True):
    """Server to engine: the reply to a `CommitBatch`.

    While the server waits for longer chunks of sampled requests it sends what it has: should the reply come too late, whether a
    token is verified must not depend on the tokens that were drawn after it (rule 2 of the design, section 3).

    Args:
        round: the round of the batch answered.
        is_final: no more is to come for this round. What is not final holds sampled drafts only, and replaces what came before.
        drafts: one entry per request that is drafted for.
        unknown: ids that the batch named and the server does not know (it restarted, say).
        report: on what is final, when it comes over a socket.
        is_full: the engine has open as much as it may: those of `unknown` are turned away until others of its requests are closed.
    """

    round: Count
    is_final: bool
    drafts: Drafts
    unknown: RequestIds
    report: Report | None = None
    is_full: bool = False


class Status(_Wire, frozen=True):
    """Server to engine: the answer to a `StatusQuery`.

    Args:
        query: the number of the query answered.
        num_requests: open requests.
        num_blocks_held: KV blocks in use.
        num_blocks: KV blocks in all.
        counters: event counts since the server started; of a server that engines share, those of `Report`.
        timings_us: durations in microseconds, by name.
    """

    query: Count
    num_requests: Count
    num_blocks_held: Count
    num_blocks: Count
    counters: dict[str, Count]
    timings_us: dict[str, DurationUs]


class Failure(_Wire, frozen=True):
    """Server to engine: the server could not do what was asked."""

    reason: str


EngineMessage = Hello | StepBegin | CommitBatch | StatusQuery | Shutdown
ServerMessage = Ready | Refused | Farewell | DraftBatch | Status | Failure
Message = EngineMessage | ServerMessage
_M = TypeVar("_M")

_encoder = msgspec.msgpack.Encoder()
_engine_messages: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)
_server_messages: msgspec.msgpack.Decoder[ServerMessage] = msgspec.msgpack.Decoder(ServerMessage)


def encode(message: Message) -> bytes:
    """Turns a message into bytes: the version byte, then msgpack.

    Raises:
        WireError: the message is over `MAX_MESSAGE_BYTES`, or holds a value that msgpack cannot carry.
    """
    try:
        body = _encoder.encode(message)
    except (TypeError, OverflowError, UnicodeEncodeError) as error:
        raise WireError(f"cannot encode a {type(message).__name__}: {_shorten(error)}") from error
    if len(body) + 1 > MAX_MESSAGE_BYTES:
        raise WireError(
            f"a {type(message).__name__} of {len(body) + 1} bytes is over the limit of {MAX_MESSAGE_BYTES} bytes"
        )
    return bytes((PROTOCOL_VERSION,)) + body


def decode_for_server(data: bytes) -> EngineMessage:
    """Reads a message that an engine sent to a draft server.

    Raises:
        WireError: the bytes are empty, oversized, of another version, malformed, or not an engine's message.
    """
    return _decode(data, _engine_messages, "from an engine")


def decode_for_engine(data: bytes) -> ServerMessage:
    """Reads a message that a draft server sent to an engine.

    Raises:
        WireError: the bytes are empty, oversized, of another version, malformed, or not a draft server's message.
    """
    return _decode(data, _server_messages, "from a draft server")


def _decode(data: bytes, decoder: msgspec.msgpack.Decoder[_M], origin: str) -> _M:
    if not data:
        raise WireError(f"a message {origin} is empty")
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message {origin} has {len(data)} bytes, over the limit of {MAX_MESSAGE_BYTES} bytes")
    if data[0] != PROTOCOL_VERSION:
        raise VersionError(f"a message {origin} has protocol version {data[0]}; this side speaks {PROTOCOL_VERSION}")
    try:
        return decoder.decode(memoryview(data)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # msgspec lets broken UTF-8 through as the latter.
        raise WireError(f"{len(data)} bytes are not a valid message {origin}: {_shorten(error)}") from error


def _shorten(error: Exception) -> str:
    """An error's text, safe for one log line: it can quote megabytes of what a peer sent."""
    return ascii(str(error)[:_MAX_REASON_LENGTH])[1:-1]
