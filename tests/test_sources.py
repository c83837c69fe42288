"""Sources of prompts, with made-up records and a made-up package."""

import importlib.metadata
import sys
import types

import pytest

from d2sd_jax.errors import UsageError
from d2sd_jax.training import sources


def test_prompts_of_records():
  assert sources.nq_prompt({"question": "who sang it?"}, 0) == "Who sang it?"
  record = {"question": "is it big", "passage": " It -- is.\n"}
  assert sources.boolq_prompt(record, 0) == "It -- is.\n\nIs it big?"
  summary = "Summarize the following text:\nIt -- is."
  assert sources.boolq_prompt(record, 1) == summary
  record = {"question": "Which? ", "options": "A. one\nB. two"}
  assert sources.mmlu_prompt(record, 0) == "Which?\nA. one\nB. two"


def test_only_sources_with_a_share_are_loaded(monkeypatch):
  def source(prompts):
    return sources.Source(
      requirement="p==1", licence="MIT", load=lambda: list(prompts)
    )

  made = {"a": source("xy"), "b": source(["z"]), "c": None}
  monkeypatch.setattr(sources, "SOURCES", made)
  first, second = sources.load_top_ups({"a": 0.5, "b": 0.1, "c": 0.0})
  assert (first.prompts, second.share) == (["x", "y"], 0.1)
  told = first.describe()
  assert (told["name"], told["prompts"], told["licence"]) == ("a", 2, "MIT")
  assert told["sha256"] != second.describe()["sha256"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("D2SD_CACHE", str(tmp_path))
  monkeypatch.setattr(sources, "_PER_TASK", 2)
  monkeypatch.setattr(sources, "_GYM_TASKS", ("gcd", "lcm"))
  return tmp_path


def _install(monkeypatch, version):
  def create_dataset(name, size, seed):
    return [{"question": f" {name} {seed} {i} "} for i in range(size)]

  module = types.SimpleNamespace(create_dataset=create_dataset)
  monkeypatch.setitem(sys.modules, "reasoning_gym", module)
  monkeypatch.setattr(importlib.metadata, "version", lambda name: version)


def test_gym_prompts_are_made_once(cache, monkeypatch):
  _install(monkeypatch, sources.REASONING_GYM)
  expected = ["gcd 0 0", "lcm 0 0", "gcd 0 1", "lcm 0 1"]
  assert sources.gym_prompts() == expected
  monkeypatch.setitem(sys.modules, "reasoning_gym", None)
  assert sources.gym_prompts() == expected


def test_another_version_is_refused(cache, monkeypatch):
  _install(monkeypatch, "0.2.0")
  with pytest.raises(UsageError, match=r"reasoning-gym='0.2.0'.*0.1.25"):
    sources.gym_prompts()
  assert list(cache.iterdir()) == []


def test_without_the_package_the_extra_is_named(cache, monkeypatch):
  _install(monkeypatch, sources.REASONING_GYM)
  monkeypatch.setitem(sys.modules, "reasoning_gym", None)
  with pytest.raises(UsageError, match=r"share_reasoning_gym.*\[corpus\]"):
    sources.gym_prompts()
