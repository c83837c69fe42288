"""Text to token ids and back; what every model's tokenizer has in common."""

import abc
import codecs
from collections.abc import Iterable, Mapping, Sequence

import tokenizers

from d2sd_jax.errors import UsageError, require

ROLES = ("system", "user", "assistant")


class ChatTokenizer(abc.ABC):
  """A vocabulary and a chat format; subclasses say how turns are written.

  Attributes:
    vocab_size: number of ids.
    special_ids: ids of the marks that are not text, ascending.
    stop_ids: ids that end an answer, the end of a turn first.
    chat_ids: all ids that conversations are marked with, ascending.
  """

  def __init__(
    self,
    bpe: tokenizers.Tokenizer,
    id_bytes: Sequence[bytes],
    *,
    special_ids: Iterable[int],
    stop_ids: Sequence[int],
    chat_ids: Iterable[int],
  ):
    """A tokenizer of these parts.

    Args:
      bpe: encodes text.
      id_bytes: what each id stands for.
      special_ids: see the attribute.
      stop_ids: see the attribute.
      chat_ids: see the attribute.
    """
    self._bpe = bpe
    # What looks like a mark in a user's text is text.
    self._bpe.encode_special_tokens = True
    self._id_bytes = list(id_bytes)
    self.vocab_size = len(self._id_bytes)
    self.special_ids = tuple(sorted(special_ids))
    self.stop_ids = tuple(stop_ids)
    self.chat_ids = tuple(sorted(chat_ids))

  @abc.abstractmethod
  def encode_chats(
    self, conversations: Sequence[Sequence[Mapping[str, str]]]
  ) -> list[list[int]]:
    """Ids of conversations, each ending with the answer opened.

    Args:
      conversations: turns with a `role` of `ROLES` and a `content`.

    Raises:
      UsageError: one has no turn, or one that is not such a mapping.
    """

  def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of one conversation; see `encode_chats`."""
    return self.encode_chats([messages])[0]

  def encode(self, text: str) -> list[int]:
    """Ids of plain text; a special token's name in it is text as well.

    Raises:
      UsageError: the text is no valid Unicode.
    """
    check_unicode("text", text)
    return self._bpe.encode(text, add_special_tokens=False).ids

  def encode_prompt(self, text: str) -> list[int]:
    """Ids of a conversation of one user turn, and the answer opened.

    Raises:
      UsageError: the prompt is empty, blank or no valid Unicode.
    """
    return self.encode_prompts([text])[0]

  def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode_prompt` of many texts at once.

    Raises:
      UsageError: as `encode_prompt`.
    """
    for text in texts:
      check_prompt(text)
    return self.encode_chats([[{"role": "user", "content": t}] for t in texts])

  def check_mask_token(self, token_id: int) -> None:
    """Raises `UsageError` unless the target never produces `token_id`.

    That is a special id that marks no turn, or one past the vocabulary, where
    the embedding has rows to spare.
    """
    free = sorted(set(self.special_ids) - set(self.chat_ids))
    # A vocabulary may have no special ids to spare.
    unused = token_id in free if free else token_id not in self.chat_ids
    marks = f"an id that marks no turn: none of {list(self.chat_ids)}"
    never = f"a special id that the target never produces: {free}"
    expected = never if free else marks
    past = token_id >= self.vocab_size
    require(unused or past, "mask_token_id", token_id, expected)

  def decode(self, ids: Iterable[int]) -> str:
    """Text of all the ids, special tokens by name.

    Bytes that are no UTF-8 become U+FFFD, as an answer cut in the middle of a
    character does.

    Raises:
      UsageError: an id is not in the vocabulary.
    """
    ids = list(ids)
    if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
      for token_id in ids:
        self.token_bytes(token_id)
    raw = b"".join(map(self._id_bytes.__getitem__, ids))
    return raw.decode("utf-8", errors="replace")

  def stream(self) -> "TextStream":
    """A decoder for ids that arrive a few at a time."""
    return TextStream(self)

  def token_bytes(self, token_id: int) -> bytes:
    """The bytes one id stands for.

    Raises:
      UsageError: the id is not in the vocabulary.
    """
    known = 0 <= token_id < self.vocab_size
    expected = f"0 to {self.vocab_size - 1}"
    require(known, "token id", int(token_id), expected)
    return self._id_bytes[token_id]


class TextStream:
  """Decodes ids as they come, never giving out half a character.

  The pieces joined equal `ChatTokenizer.decode` of all the ids.
  """

  def __init__(self, tokenizer: ChatTokenizer):
    self._tokenizer = tokenizer
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

  def push(self, ids: Iterable[int]) -> str:
    """Takes further ids; returns the text they complete, maybe none."""
    raw = b"".join(self._tokenizer.token_bytes(i) for i in ids)
    return self._decoder.decode(raw)

  def flush(self) -> str:
    """Ends the text: U+FFFD if a character was left incomplete, else none."""
    return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
  """Byte-level BPE's character -> byte: printable ones are themselves.

  The other bytes, in order, are the characters from U+0100 on.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = sorted(set(range(256)) - set(printable))
  shifted = {chr(256 + i): byte for i, byte in enumerate(hidden)}
  return {chr(byte): byte for byte in printable} | shifted


BYTE_OF = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
  """The bytes of a token of byte-level BPE."""
  try:
    return bytes(BYTE_OF[character] for character in token)
  except KeyError:
    # A special token may be spelt with characters outside that alphabet.
    return token.encode()


def check_prompt(text: str) -> None:
  """Raises `UsageError` unless the prompt is some valid text."""
  is_text = isinstance(text, str) and bool(text.strip())
  require(is_text, "prompt", text, "some text")
  check_unicode("prompt", text)


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
  """Checks a conversation; needs no tokenizer.

  Raises:
    UsageError: it is empty, or a turn lacks a known role or a valid text.
  """
  require(len(messages) > 0, "messages", messages, "at least one turn")
  for i, message in enumerate(messages):
    _check_message(i, message)


def _check_message(index: int, message: Mapping[str, str]) -> None:
  """Raises `UsageError` unless the message has a known role and a text."""
  field = f"messages[{index}]"
  is_mapping = isinstance(message, Mapping)
  require(is_mapping, field, message, "a mapping with role and content")
  role, content = message.get("role"), message.get("content")
  require(role in ROLES, f"{field} role", role, f"one of {', '.join(ROLES)}")
  require(isinstance(content, str), f"{field} content", content, "a string")
  check_unicode(f"{field} content", str(content))


def check_unicode(field: str, text: str) -> None:
  """Raises `UsageError` for text that no UTF-8 can hold (lone surrogates)."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UsageError(f"{field} {text[:40]!r}: expected valid UTF-8") from error
