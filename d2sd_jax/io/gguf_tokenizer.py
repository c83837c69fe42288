"""Tokenizers from the metadata of GGUF files."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.gguf_header import read_header
from d2sd_jax.io.template_tokenizer import TemplateTokenizer
from d2sd_jax.io.tokenizer import (
  ChatTokenizer,
  byte_level_bytes,
  check_messages,
  check_prompt,
)

DEFAULT_SYSTEM = (
  "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)
_CONTROL = 3  # llama.cpp's token type of the marks that are not text.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before BPE, by llama.cpp's name of the way.
_SPLITS = {"qwen2": _WORDS % "", "llama-bpe": _WORDS % "{1,3}"}


class SmolLM2Tokenizer(ChatTokenizer):
  """Byte-level BPE and the ChatML format of the SmolLM2 family."""

  def __init__(self, metadata: Mapping[str, Any]):
    """Builds the tokenizer from a GGUF file's metadata.

    Raises:
      UsageError: the metadata lacks a field, or describes another kind of
        tokenizer or chat format.
    """
    require_field(metadata, "tokenizer.ggml.model", ("gpt2",))
    require_field(metadata, "tokenizer.ggml.pre", ("smollm",))
    template = _get(metadata, "tokenizer.chat_template")
    if not is_smollm2_format(template):
      raise UsageError(
        "tokenizer.chat_template: expected ChatML with SmolLM's system turn"
      )
    vocabulary = _Vocabulary(metadata)
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    self._turn_start = vocabulary.mark("<|im_start|>")
    self._turn_end = vocabulary.mark("<|im_end|>")
    stop_ids = (self._turn_end, vocabulary.mark("<|endoftext|>"))
    super().__init__(
      vocabulary.bpe(pre_tokenizers.Sequence([digits, words])),
      vocabulary.id_bytes,
      special_ids=vocabulary.special_ids,
      stop_ids=stop_ids,
      chat_ids={self._turn_start, *stop_ids},
    )

  def encode_chats(
    self, conversations: Sequence[Sequence[Mapping[str, str]]]
  ) -> list[list[int]]:
    """Ids of conversations in ChatML, each ending with the answer opened.

    Args:
      conversations: turns with a `role` of `ROLES` and a `content`. Without a
        system turn at the beginning, the model's default one is put there.

    Raises:
      UsageError: one has no turn, or one that is not such a mapping.
    """
    return [self._encode_conversation(messages) for messages in conversations]

  def _encode_conversation(self, messages):
    check_messages(messages)
    ids: list[int] = []
    if messages[0]["role"] != "system":
      ids += self._encode_turn("system", DEFAULT_SYSTEM)
    for message in messages:
      ids += self._encode_turn(message["role"], message["content"])
    return [*ids, self._turn_start, *self.encode("assistant\n")]

  def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode_prompt` of many texts at once, in threads.

    Raises:
      UsageError: as `encode_prompt`.
    """
    for text in texts:
      check_prompt(text)
    turns = self._bpe.encode_batch_fast(
      [f"user\n{text}" for text in texts], add_special_tokens=False
    )
    before = [*self._encode_turn("system", DEFAULT_SYSTEM), self._turn_start]
    after = [self._turn_end, *self.encode("\n")]
    after += [self._turn_start, *self.encode("assistant\n")]
    return [before + turn.ids + after for turn in turns]

  def _encode_turn(self, role: str, content: str) -> list[int]:
    text = self.encode(f"{role}\n{content}")
    return [self._turn_start, *text, self._turn_end, *self.encode("\n")]


def gguf_tokenizer(path: str | os.PathLike[str]) -> ChatTokenizer:
  """The tokenizer and chat format of a GGUF file.

  Raises:
    UsageError: the file cannot be read; its metadata lack a field or describe
      a kind of tokenizer that is not known; or its embedding has no row for
      some of the tokens.
  """
  header = read_header(path)
  try:
    tokenizer = _from_metadata(header.metadata)
  except UsageError as error:
    raise UsageError(f"{header.path}: {error}") from error
  embedding = header.tensors.get("token_embd.weight")
  if embedding is not None and embedding.shape[0] < tokenizer.vocab_size:
    raise UsageError(
      f"{header.path}: tokenizer.ggml.tokens: {tokenizer.vocab_size} tokens:"
      f" expected at most the embedding's {embedding.shape[0]}"
    )
  return tokenizer


def is_smollm2_format(template: Any) -> bool:
  """Whether a chat template is SmolLM2's, which needs no rendering."""
  return DEFAULT_SYSTEM in str(template) and "<|im_start|>" in str(template)


def _from_metadata(metadata: Mapping[str, Any]) -> ChatTokenizer:
  pre = _get(metadata, "tokenizer.ggml.pre")
  if pre not in tuple(_SPLITS):
    return SmolLM2Tokenizer(metadata)
  require_field(metadata, "tokenizer.ggml.model", ("gpt2",))
  vocabulary = _Vocabulary(metadata)
  split = pre_tokenizers.Split(
    tokenizers.Regex(_SPLITS[pre]), behavior="isolated"
  )
  level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  template = _get(metadata, "tokenizer.chat_template")
  ids = {name: vocabulary.optional_id(name) for name in ("bos", "eos", "eot")}
  return TemplateTokenizer(
    vocabulary.bpe(pre_tokenizers.Sequence([split, level])),
    vocabulary.id_bytes,
    special_ids=vocabulary.special_ids,
    stop_ids=[i for i in (ids["eot"], ids["eos"]) if i is not None],
    template=str(template),
    variables={
      f"{name}_token": vocabulary.tokens[i]
      for name, i in ids.items()
      if name != "eot" and i is not None
    },
    where="tokenizer.chat_template",
  )


class _Vocabulary:
  """Tokens, merges and marks of a GGUF file's byte-level BPE."""

  def __init__(self, metadata: Mapping[str, Any]):
    self.tokens = _strings(metadata, "tokenizer.ggml.tokens")
    self._merges = _strings(metadata, "tokenizer.ggml.merges")
    kinds = _get(metadata, "tokenizer.ggml.token_type")
    if not isinstance(kinds, list) or len(kinds) != len(self.tokens):
      raise UsageError(
        "tokenizer.ggml.token_type: expected one for each of the"
        f" {len(self.tokens)} tokens"
      )
    self._metadata = metadata
    self._ids = {token: i for i, token in enumerate(self.tokens)}
    self.special_ids = [i for i, kind in enumerate(kinds) if kind == _CONTROL]
    self.id_bytes = [byte_level_bytes(token) for token in self.tokens]

  def bpe(self, pre_tokenizer: Any) -> tokenizers.Tokenizer:
    """BPE over what `pre_tokenizer` makes of a text."""
    try:
      pairs = [(left, right) for left, right in map(str.split, self._merges)]
      bpe = tokenizers.Tokenizer(models.BPE(self._ids, pairs))
    except Exception as error:  # the library raises no narrower one
      raise UsageError(
        f"tokenizer.ggml.merges: expected pairs of tokens ({error})"
      ) from error
    bpe.pre_tokenizer = pre_tokenizer
    bpe.add_special_tokens([self.tokens[i] for i in self.special_ids])
    return bpe

  def optional_id(self, name: str) -> int | None:
    """Id of the token with this meaning, where the file states one."""
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = self._metadata.get(key)
    known = type(token_id) is int and 0 <= token_id < len(self.tokens)
    expected = f"an id below {len(self.tokens)}"
    require(token_id is None or known, key, token_id, expected)
    return token_id

  def mark(self, token: str) -> int:
    """Id of a special token."""
    token_id = self._ids.get(token)
    if token_id not in self.special_ids:
      raise UsageError(
        f"tokenizer.ggml.tokens: expected the special token {token!r}"
      )
    return token_id


def require_field(
  metadata: Mapping[str, Any], key: str, known: Sequence[str]
) -> None:
  """Raises `UsageError` unless the field has one of the known values."""
  found = _get(metadata, key)
  require(found in known, key, found, " or ".join(map(repr, known)))


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
