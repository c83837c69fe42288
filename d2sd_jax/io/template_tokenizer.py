"""Tokenizers whose chat format is a template: Hugging Face's and most GGUFs'.

The ids are those of the rendered text, marks and all, as Hugging Face's own
`apply_chat_template` gives them. One thing differs: what looks like a mark in
a user's text stays text.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from d2sd_jax.errors import UsageError, require
from d2sd_jax.io import chat_template
from d2sd_jax.io.hf_folder import read_json
from d2sd_jax.io.tokenizer import (
  ChatTokenizer,
  byte_level_bytes,
  check_messages,
  check_unicode,
)

TOKENIZER_FILE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE, GENERATION_FILE = "chat_template.jinja", "generation_config.json"
# Private-use characters that stand for a mark's name in a user's text.
_OPEN, _CLOSE = "\ue0d2", "\ue05d"
# Templates ask whether these are none, not only whether they are there.
_ABSENT = {"tools": None, "documents": None}
# More is a damaged file: a list of all ids is made.
_MAX_IDS = 2**22
# A byte that SentencePiece has no other token for.
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TemplateTokenizer(ChatTokenizer):
  """A tokenizer with a Jinja chat template."""

  def __init__(
    self,
    bpe: tokenizers.Tokenizer,
    id_bytes: Sequence[bytes],
    *,
    special_ids: Iterable[int],
    stop_ids: Sequence[int],
    template: str,
    variables: Mapping[str, Any],
    where: str,
  ):
    """A tokenizer of these parts.

    Args:
      bpe: encodes text.
      id_bytes: what each id stands for.
      special_ids: ids of marks.
      stop_ids: ids that end an answer.
      template: Jinja source.
      variables: what the template may ask for beside the messages.
      where: what errors call the template.

    Raises:
      UsageError: the template cannot write a conversation of one turn, or
        there is no stop id, or one that is not in the vocabulary.
    """
    super().__init__(
      bpe, id_bytes, special_ids=special_ids, stop_ids=stop_ids, chat_ids=()
    )
    known = len(stop_ids) > 0 and 0 <= min(stop_ids) <= max(stop_ids)
    known = known and max(stop_ids) < self.vocab_size
    require(known, "eos_token_id", list(stop_ids), "ids of the vocabulary")
    self._template, self._where = template, where
    self._variables = {**_ABSENT, **variables, "add_generation_prompt": True}
    self._marks = sorted(
      {self._id_bytes[i].decode(errors="replace") for i in self.special_ids},
      key=len,
      reverse=True,
    )
    sample = self.encode_chat([{"role": "user", "content": "a"}])
    marks = set(sample) & set(self.special_ids)
    self.chat_ids = tuple(sorted(marks | set(self.stop_ids)))

  def encode_chats(
    self, conversations: Sequence[Sequence[Mapping[str, str]]]
  ) -> list[list[int]]:
    """Ids of conversations by the template, each with the answer opened.

    Args:
      conversations: turns with a `role` of `ROLES` and a `content`.

    Raises:
      UsageError: one has no turn, or one that is not such a mapping; or the
        template refuses it, or writes nothing or no valid Unicode.
    """
    hidden: list[str] = []
    for messages in conversations:
      check_messages(messages)
    texts = chat_template.render(
      self._template,
      [[self._hide(m, hidden) for m in c] for c in conversations],
      self._variables,
      self._where,
    )
    for text in texts:
      check_unicode(self._where, text)
    with _told(f"{self._where}: expected text for the tokenizer"):
      encoded = [self._encode_marked(text, hidden) for text in texts]
    if not all(encoded):
      raise UsageError(f"{self._where}: expected to write some text")
    return encoded

  def _hide(
    self, message: Mapping[str, str], hidden: list[str]
  ) -> dict[str, str]:
    """The message, with the names of marks in it replaced by numbers."""
    content = message["content"]
    for mark in self._marks:
      if mark and mark in content:
        content = content.replace(mark, f"{_OPEN}{len(hidden)}{_CLOSE}")
        hidden.append(mark)
    return {**message, "content": content}

  def _encode_marked(self, text: str, hidden: Sequence[str]) -> list[int]:
    """Ids of a rendered text: its marks are marks, hidden ones are text."""
    if not hidden:
      return self._encode_with_marks(text)
    ids: list[int] = []
    for number, piece in enumerate(text.split(_OPEN)):
      index, close, rest = piece.partition(_CLOSE)
      if number and close and index.isdecimal() and int(index) < len(hidden):
        ids += self.encode(hidden[int(index)])
        piece = rest
      elif number:
        piece = _OPEN + piece
      ids += self._encode_with_marks(piece)
    return ids

  def _encode_with_marks(self, text: str) -> list[int]:
    self._bpe.encode_special_tokens = False
    try:
      return self._bpe.encode(text, add_special_tokens=False).ids
    finally:
      self._bpe.encode_special_tokens = True


def hf_tokenizer(folder: Path) -> TemplateTokenizer:
  """The tokenizer and chat template of a Hugging Face folder.

  Args:
    folder: holds `tokenizer.json` and `tokenizer_config.json`; the template in
      the latter, or as `chat_template.jinja`; stop ids in
      `generation_config.json`, or in `config.json`.

  Raises:
    UsageError: a file is missing or damaged, the tokenizer is of a kind that
      is not known, or the template cannot be rendered.
  """
  path = folder / TOKENIZER_FILE
  raw = read_json(path)
  with _told(f"{path}: expected a tokenizer"):
    bpe = tokenizers.Tokenizer.from_file(str(path))
  # Padding and cutting are settings of training, not of the text.
  bpe.no_padding()
  bpe.no_truncation()
  config = read_json(folder / TOKENIZER_CONFIG)
  template, where = _find_template(folder, config)
  return TemplateTokenizer(
    bpe,
    _id_bytes(raw, bpe, path),
    special_ids=[
      i for i, t in bpe.get_added_tokens_decoder().items() if t.special
    ],
    stop_ids=_stop_ids(folder),
    template=template,
    variables=_special_names(config),
    where=where,
  )


@contextlib.contextmanager
def _told(expected: str) -> Iterator[None]:
  """Turns what `tokenizers` raises over a damaged file into `UsageError`."""
  try:
    yield
  except (UsageError, KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # the library's panics are no `Exception`
    raise UsageError(f"{expected} ({error})") from error


def _id_bytes(
  raw: Mapping[str, Any], bpe: tokenizers.Tokenizer, path: Path
) -> list[bytes]:
  """What each id stands for, by the kind of the tokenizer's decoder."""
  kinds = set(_decoder_kinds(raw.get("decoder")))
  to_bytes: Callable[[str], bytes]
  if "ByteLevel" in kinds:
    to_bytes = byte_level_bytes
  elif "ByteFallback" in kinds:
    to_bytes = _fallback_bytes
  else:
    raise UsageError(
      f"{path}: decoder {sorted(kinds)}: expected ByteLevel or ByteFallback"
    )
  added = bpe.get_added_tokens_decoder()
  pieces = {i: token for token, i in bpe.get_vocab(True).items()}
  size = max(pieces, default=-1) + 1
  require(
    0 < size <= _MAX_IDS, str(path), size, f"a vocabulary of 1 to {_MAX_IDS}"
  )
  return [
    added[i].content.encode() if i in added else to_bytes(pieces.get(i, ""))
    for i in range(size)
  ]


def _decoder_kinds(decoder: Any) -> list[str]:
  """Types of a decoder and of the decoders it is made of."""
  if not isinstance(decoder, Mapping):
    return []
  parts = decoder.get("decoders") or []
  inner = itertools.chain.from_iterable(map(_decoder_kinds, parts))
  return [str(decoder.get("type")), *inner]


def _fallback_bytes(piece: str) -> bytes:
  """The bytes of a SentencePiece token: `<0x0A>`, or text with ▁ for space."""
  if found := _BYTE.fullmatch(piece):
    return bytes.fromhex(found[1])
  return piece.replace("\u2581", " ").encode()


def _find_template(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
  """The chat template and where it was found."""
  path = folder / TEMPLATE_FILE
  if path.is_file():
    try:
      return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
      raise UsageError(f"{path}: expected a template ({error})") from error
  where = f"{folder / TOKENIZER_CONFIG}: chat_template"
  template = config.get("chat_template")
  if isinstance(template, list):
    template = next(
      (
        t.get("template")
        for t in template
        if isinstance(t, Mapping) and t.get("name") == "default"
      ),
      None,
    )
  if not isinstance(template, str):
    raise UsageError(f"{where}: expected one there or in {TEMPLATE_FILE}")
  return template, where


def _stop_ids(folder: Path) -> list[int]:
  """Ids that end an answer, from whichever file states them."""
  for name in (GENERATION_FILE, "config.json"):
    path = folder / name
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    if found is None:
      continue
    ids = found if isinstance(found, list) else [found]
    if not all(type(i) is int for i in ids):
      raise UsageError(f"{path}: eos_token_id={found!r}: expected token ids")
    return list(dict.fromkeys(ids))
  raise UsageError(f"{folder}: eos_token_id: expected in {GENERATION_FILE}")


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
  """`bos_token` and its like, as the templates ask for them."""
  names = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      value = value.get("content")
    if key.endswith("_token") and isinstance(value, str):
      names[key] = value
  return names
