"""Tokenizers with a chat template, and templates that mean harm."""

import time

import hf_folders
import pytest
import tokenizers
from hf_folders import MARKS, write_target
from tokenizers import decoders, models

from d2sd_jax import UsageError
from d2sd_jax.io import chat_template
from d2sd_jax.io.template_tokenizer import hf_tokenizer

_TURNS = [
  {"role": "system", "content": "Be brief."},
  {"role": "user", "content": "  hey a \n"},
]


def _render(template, conversations=(_TURNS,), **variables):
  return chat_template.render(template, conversations, variables, "template")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return hf_tokenizer(write_target(tmp_path_factory.mktemp("target")))


def test_ids_are_those_of_the_rendered_text(tokenizer):
  text = "<|turn|>system\nBe brief.<|end|>\n<|turn|>user\nhey a<|end|>\n"
  text += "<|turn|>assistant\n"
  expected = hf_folders.make_tokenizer().encode(text).ids
  assert tokenizer.encode_chat(_TURNS) == expected
  assert expected[0] == MARKS.index("<|turn|>")
  assert tokenizer.decode(expected) == text


def test_ids_with_a_meaning(tokenizer):
  assert tokenizer.special_ids == (0, 1, 2, 3)
  assert tokenizer.stop_ids == (0,)
  assert tokenizer.chat_ids == (0, 1)
  tokenizer.check_mask_token(2)
  tokenizer.check_mask_token(265)  # A row of the embedding past the tokens.
  for taken in (0, 1, 40):
    with pytest.raises(UsageError, match="mask_token_id"):
      tokenizer.check_mask_token(taken)


@pytest.mark.parametrize("mark", ["<|end|>", "<|turn|>user", "\ue0d20\ue05d"])
def test_marks_in_a_users_text_are_text(tokenizer, mark):
  content = f"hey {mark} a"
  ids = tokenizer.encode_prompt(content)
  plain = tokenizer.encode_prompt("hey  a")
  count = lambda ids: [ids.count(i) for i in tokenizer.special_ids]
  assert count(ids) == count(plain)
  assert content in tokenizer.decode(ids)


def test_many_conversations_at_once(tokenizer):
  others = [[{"role": "user", "content": text}] for text in ("a", "<|end|>b")]
  expected = [tokenizer.encode_chat(c) for c in (_TURNS, *others)]
  assert tokenizer.encode_chats([_TURNS, *others]) == expected
  assert tokenizer.encode_prompts(["a", "<|end|>b"]) == expected[1:]


def test_stop_ids_of_the_generation_settings_come_first(tmp_path):
  folder = write_target(tmp_path)
  (folder / "generation_config.json").write_text('{"eos_token_id": [3, 0, 3]}')
  assert hf_tokenizer(folder).stop_ids == (3, 0)


def test_a_template_of_its_own_file_comes_first(tmp_path):
  folder = write_target(tmp_path)
  (folder / "chat_template.jinja").write_text("{{ eos_token }}!")
  tokenizer = hf_tokenizer(folder)
  assert tokenizer.decode(tokenizer.encode_prompt("a")) == "<|end|>!"


def test_tools_are_none(tmp_path):
  folder = write_target(tmp_path)
  template = "{% if tools is not none or documents %}tools{% endif %}a"
  (folder / "chat_template.jinja").write_text(template)
  tokenizer = hf_tokenizer(folder)
  assert tokenizer.decode(tokenizer.encode_prompt("b")) == "a"


@pytest.mark.parametrize("template", ["", "{{ '\\ud800' }}"])
def test_a_template_without_text_is_refused(tmp_path, template):
  folder = write_target(tmp_path)
  (folder / "chat_template.jinja").write_text(template)
  with pytest.raises(UsageError, match=r"chat_template\.jinja"):
    hf_tokenizer(folder)


def test_text_of_byte_fallback(tmp_path):
  folder = write_target(tmp_path)
  pieces = [*MARKS, "\u2581a", "<0xC3>", "<0xA9>", "\u2581", "a", "<0xZZ>"]
  bpe = tokenizers.Tokenizer(
    models.BPE({p: i for i, p in enumerate(pieces)}, [("\u2581", "a")])
  )
  bpe.add_special_tokens(list(MARKS))
  bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
  bpe.save(str(folder / "tokenizer.json"))
  tokenizer = hf_tokenizer(folder)
  assert tokenizer.decode([4, 5, 6, 7, 9, 0]) == " aé <0xZZ><|end|>"


def test_another_decoder_is_refused(tmp_path):
  folder = write_target(tmp_path)
  bpe = hf_folders.make_tokenizer()
  bpe.decoder = decoders.WordPiece()
  bpe.save(str(folder / "tokenizer.json"))
  with pytest.raises(UsageError, match="WordPiece"):
    hf_tokenizer(folder)


@pytest.mark.parametrize(
  ("template", "text"),
  [
    ("{{ messages[0].content.split(' ')[-1] }}", "brief."),
    (
      "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}"
      "{% set ns.n = ns.n + loop.index0 %}{% endfor %}{{ ns.n }}",
      "1",
    ),
    (
      "{{ messages[0] | tojson }}",
      '{"role": "system", "content": "Be brief."}',
    ),
    ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
    ("{{ strftime_now('%Y') }}", time.strftime("%Y")),
    ("{% generation %}x{{ messages[1].role }}{% endgeneration %}", "xuser"),
    (
      "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}"
      "{{ m.role }}{% endfor %}",
      "system",
    ),
    (
      "{% if enable_thinking is defined %}n{% else %}a{% endif %}",
      "a",
    ),
    (
      "{%- macro turn(m) %}[{{ m.role }}]{% endmacro -%}\n"
      "{% for m in messages %}\n  {{- turn(m) -}}\n{% endfor %}",
      "[system][user]",
    ),
    ("{{ bos_token }}{{ tools }}", "B"),
  ],
)
def test_what_templates_use(template, text):
  assert _render(template, bos_token="B")[0].strip("\n") == text


@pytest.mark.parametrize(
  ("template", "reason"),
  [
    ("{{ raise_exception('only one turn') }}", "only one turn"),
    ("{% for %}", "TemplateSyntaxError"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "loader"),
    ("{{ cycler.__init__.__globals__.os.system('touch x') }}", "unsafe"),
    ("{{ range(10 ** 9) | list }}", "too big"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself"),
    ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "too much"),
    (
      "{% set ns = namespace(s='x') %}{% for i in range(40) %}"
      "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
      "too much",
    ),
    ("{{ 'x' * 10 ** 11 }}", "too much"),
  ],
)
def test_harm_ends_in_one_line(tmp_path, monkeypatch, template, reason):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UsageError) as caught:
    _render(template)
  assert str(caught.value).startswith("template: expected a chat template")
  assert reason in str(caught.value)
  assert "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_a_template_without_an_end_is_stopped(monkeypatch):
  monkeypatch.setattr(chat_template, "MAX_SECONDS", 1)
  started = time.monotonic()
  with pytest.raises(UsageError, match="it takes too"):
    _render(
      "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
      "{% endfor %}"
    )
  assert time.monotonic() - started < 10
