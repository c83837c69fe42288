"""Text to token ids and back, with the chat format, from GGUF metadata."""

import codecs
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.gguf_header import read_header

ROLES = ("system", "user", "assistant")
DEFAULT_SYSTEM = (
  "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)
_CONTROL = 3  # llama.cpp's token type of the marks that are not text.


class ChatTokenizer:
  """Byte-level BPE and the ChatML format of the SmolLM2 family.

  Attributes:
    vocab_size: number of ids.
    special_ids: ids of the marks that are not text, ascending.
    stop_ids: ids that end an answer: `<|im_end|>`, `<|endoftext|>`.
    chat_ids: all ids that conversations are marked with, ascending.
  """

  vocab_size: int
  special_ids: tuple[int, ...]
  stop_ids: tuple[int, ...]
  chat_ids: tuple[int, ...]

  def __init__(self, metadata: Mapping[str, Any]):
    """Builds the tokenizer from a GGUF file's metadata.

    Raises:
      UsageError: the metadata lacks a field, or describes another kind of
        tokenizer or chat format.
    """
    _check_kind(metadata)
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    merges = _strings(metadata, "tokenizer.ggml.merges")
    kinds = _get(metadata, "tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
      raise UsageError(
        f"tokenizer.ggml.token_type: expected one for each of the {len(tokens)}"
        " tokens"
      )
    self._tokens = tokens
    self._ids = {token: i for i, token in enumerate(tokens)}
    self._bpe = _build_bpe(self._ids, merges)
    special = [i for i, kind in enumerate(kinds) if kind == _CONTROL]
    self._bpe.add_special_tokens([tokens[i] for i in special])
    # What looks like a mark in a user's text is text.
    self._bpe.encode_special_tokens = True
    self.vocab_size = len(tokens)
    self.special_ids = tuple(special)
    self._turn_start = self._mark("<|im_start|>")
    self._turn_end = self._mark("<|im_end|>")
    self.stop_ids = (self._turn_end, self._mark("<|endoftext|>"))
    self.chat_ids = tuple(sorted({self._turn_start, *self.stop_ids}))

  @classmethod
  def from_gguf(cls, path: str | os.PathLike[str]) -> "ChatTokenizer":
    """Builds the tokenizer of a GGUF file.

    Raises:
      UsageError: as the constructor; or the file cannot be read, or its
        embedding has no row for some of the tokens.
    """
    header = read_header(path)
    try:
      tokenizer = cls(header.metadata)
    except UsageError as error:
      raise UsageError(f"{header.path}: {error}") from error
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] < tokenizer.vocab_size:
      raise UsageError(
        f"{header.path}: tokenizer.ggml.tokens: {tokenizer.vocab_size} tokens:"
        f" expected at most the embedding's {embedding.shape[0]}"
      )
    return tokenizer

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
    _check_prompt(text)
    return self.encode_chat([{"role": "user", "content": text}])

  def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode_prompt` of many texts at once, in threads.

    Raises:
      UsageError: as `encode_prompt`.
    """
    for text in texts:
      _check_prompt(text)
      check_unicode("prompt", text)
    turns = self._bpe.encode_batch_fast(
      [f"user\n{text}" for text in texts], add_special_tokens=False
    )
    before = [*self._encode_turn("system", DEFAULT_SYSTEM), self._turn_start]
    after = [self._turn_end, *self.encode("\n")]
    after += [self._turn_start, *self.encode("assistant\n")]
    return [before + turn.ids + after for turn in turns]

  def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a conversation in ChatML, ending with the answer opened.

    Args:
      messages: turns with a `role` of `ROLES` and a `content`. Without a
        system turn at the beginning, the model's default one is put there.

    Raises:
      UsageError: there is no turn, or one that is not such a mapping.
    """
    check_messages(messages)
    ids: list[int] = []
    if messages[0]["role"] != "system":
      ids += self._encode_turn("system", DEFAULT_SYSTEM)
    for message in messages:
      ids += self._encode_turn(message["role"], message["content"])
    return [*ids, self._turn_start, *self.encode("assistant\n")]

  def check_mask_token(self, token_id: int) -> None:
    """Raises `UsageError` unless the target never produces `token_id`."""
    free = sorted(set(self.special_ids) - set(self.chat_ids))
    # A vocabulary may have no special ids to spare.
    unused = token_id in free if free else token_id not in self.chat_ids
    marks = f"an id that marks no turn: none of {list(self.chat_ids)}"
    never = f"a special id that the target never produces: {free}"
    expected = never if free else marks
    require(unused, "mask_token_id", token_id, expected)

  def decode(self, ids: Iterable[int]) -> str:
    """Text of all the ids, special tokens by name.

    Bytes that are no UTF-8 become U+FFFD, as an answer cut in the middle of a
    character does.

    Raises:
      UsageError: an id is not in the vocabulary.
    """
    table = self._bytes_of
    ids = list(ids)
    if ids and not 0 <= min(ids) <= max(ids) < len(table):
      for token_id in ids:
        self.token_bytes(token_id)
    raw = b"".join(map(table.__getitem__, ids))
    return raw.decode("utf-8", errors="replace")

  def stream(self) -> "TextStream":
    """A decoder for ids that arrive a few at a time."""
    return TextStream(self)

  def token_bytes(self, token_id: int) -> bytes:
    """The bytes one id stands for.

    Raises:
      UsageError: the id is not in the vocabulary.
    """
    require(
      0 <= token_id < self.vocab_size,
      "token id",
      int(token_id),
      f"0 to {self.vocab_size - 1}",
    )
    token = self._tokens[token_id]
    try:
      return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
      # A special token may be spelt with characters outside that alphabet.
      return token.encode()

  @functools.cached_property
  def _bytes_of(self) -> list[bytes]:
    """The bytes of every id."""
    return [self.token_bytes(i) for i in range(self.vocab_size)]

  def _encode_turn(self, role: str, content: str) -> list[int]:
    text = self.encode(f"{role}\n{content}")
    return [self._turn_start, *text, self._turn_end, *self.encode("\n")]

  def _mark(self, token: str) -> int:
    token_id = self._ids.get(token)
    if token_id not in self.special_ids:
      raise UsageError(
        f"tokenizer.ggml.tokens: expected the special token {token!r}"
      )
    return token_id


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


_BYTE_OF = _byte_alphabet()


def _build_bpe(
  vocabulary: dict[str, int], merges: Sequence[str]
) -> tokenizers.Tokenizer:
  """BPE over bytes, of words within which every digit stands alone."""
  try:
    pairs = [(left, right) for left, right in map(str.split, merges)]
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
  except Exception as error:  # the library raises no narrower one
    raise UsageError(
      f"tokenizer.ggml.merges: expected pairs of tokens ({error})"
    ) from error
  digits = pre_tokenizers.Digits(individual_digits=True)
  words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
  return bpe


def _check_kind(metadata: Mapping[str, Any]) -> None:
  """Raises `UsageError` for a tokenizer or chat format of another family."""
  for field, expected in (("model", "gpt2"), ("pre", "smollm")):
    key = f"tokenizer.ggml.{field}"
    found = _get(metadata, key)
    require(found == expected, key, found, repr(expected))
  template = _get(metadata, "tokenizer.chat_template")
  if DEFAULT_SYSTEM not in str(template) or "<|im_start|>" not in str(template):
    raise UsageError(
      "tokenizer.chat_template: expected ChatML with SmolLM's system turn"
    )


def _check_prompt(text: str) -> None:
  is_text = isinstance(text, str) and bool(text.strip())
  require(is_text, "prompt", text, "some text")


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


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
  """A field that holds a list of strings."""
  value = _get(metadata, key)
  if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
    raise UsageError(f"{key}: expected a list of strings")
  return value


def _get(metadata: Mapping[str, Any], key: str) -> Any:
  if key not in metadata:
    raise UsageError(f"{key} is missing from the target's metadata")
  return metadata[key]
