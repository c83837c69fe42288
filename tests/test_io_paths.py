"""Where files are found, and how they are written."""

import pytest

from d2sd_jax.errors import UsageError
from d2sd_jax.io import paths


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A checkout of our own: configs and checkpoints above the package."""
  root = tmp_path / "checkout"
  for name in ("alpha", "beta", "_shared"):
    (root / "configs").mkdir(parents=True, exist_ok=True)
    (root / "configs" / f"{name}.py").touch()
  (root / "checkpoints" / "small-dflash").mkdir(parents=True)
  (root / "checkpoints" / ".hidden").mkdir()
  (root / "checkpoints" / "README.md").touch()
  (root / "d2sd_jax").mkdir()
  monkeypatch.setattr(paths, "_PACKAGE", root / "d2sd_jax")
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  return root / "d2sd_jax"


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
  monkeypatch.delenv("D2SD_CACHE", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  assert paths.cache_dir() == tmp_path / "xdg" / "d2sd_jax"
  monkeypatch.setenv("D2SD_CACHE", str(tmp_path / "own"))
  assert paths.cache_dir() == tmp_path / "own"
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("D2SD_CACHE", "~/short")
  assert paths.cache_dir() == tmp_path / "short"
  monkeypatch.setenv("D2SD_CACHE", "~nobody-of-that-name/cache")
  with pytest.raises(UsageError, match="path='~nobody-of-that-name/cache'"):
    paths.cache_dir()


@pytest.mark.parametrize("name", ["beta", "beta.py", "configs/beta.py"])
def test_find_config_by_shipped_name(package, name):
  assert paths.find_config(name) == package.parent / "configs" / "beta.py"


def test_find_config_prefers_the_users_file(package, tmp_path):
  own = tmp_path / "elsewhere" / "beta.py"
  own.touch()
  assert paths.find_config("beta.py").resolve() == own
  # A bare name is no file, so it is still the shipped one.
  assert paths.find_config("beta") == package.parent / "configs" / "beta.py"


def test_installed_package_does_not_look_beside_itself(package):
  (package / "configs").mkdir()
  (package / "configs" / "gamma.py").touch()
  assert paths.find_config("gamma") == package / "configs" / "gamma.py"
  with pytest.raises(UsageError, match=r"shipped name \(gamma\)"):
    paths.find_config("alpha")


@pytest.mark.parametrize(
  "name", ["delta", "other/alpha.py", "../configs/alpha", "_shared", ""]
)
def test_find_config_names_what_there_is(package, name):
  with pytest.raises(UsageError, match=r"config='.*\(alpha, beta\)$") as caught:
    paths.find_config(name)
  assert "\n" not in str(caught.value)


def test_find_checkpoint(package, tmp_path):
  shipped = package.parent / "checkpoints" / "small-dflash"
  assert paths.find_checkpoint("small-dflash") == shipped
  assert paths.find_checkpoint("checkpoints/small-dflash/") == shipped
  own = tmp_path / "runs" / "mine"
  own.mkdir(parents=True)
  assert paths.find_checkpoint(own) == own


@pytest.mark.parametrize("name", ["nope", ".hidden", "README.md"])
def test_find_checkpoint_names_field_value_and_choices(package, name):
  with pytest.raises(UsageError) as caught:
    paths.find_checkpoint(name, "vp_drafter")
  assert str(caught.value) == (
    f"vp_drafter={name!r}: no such folder; expected an existing one or a"
    " shipped name (small-dflash)"
  )


def test_atomic_write_replaces_only_when_complete(tmp_path):
  final = tmp_path / "new" / "file.json"
  with paths.atomic_write(final) as temporary:
    assert temporary.parent == final.parent
    temporary.write_text("one")
    assert not final.exists()
  with paths.atomic_write(final) as temporary:
    temporary.write_text("two")
    assert final.read_text() == "one"
  assert final.read_text() == "two"
  assert list(final.parent.iterdir()) == [final]


def test_atomic_write_takes_any_name_the_system_takes(tmp_path):
  final = tmp_path / ("n" * 255)
  with paths.atomic_write(final) as temporary:
    temporary.touch()
  assert final.exists()


def test_check_writable_leaves_nothing(tmp_path):
  paths.check_writable("json", "x", tmp_path / "new" / "folder")
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "file").touch()
  with pytest.raises(UsageError, match=r"json='x': expected a place open"):
    paths.check_writable("json", "x", tmp_path / "file" / "folder")
  # There folders say that they can be written to, and cannot.
  with pytest.raises(UsageError, match=r"json='x': expected a place open"):
    paths.check_writable("json", "x", paths.Path("/proc/self"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("wrote", [True, False])
def test_atomic_write_interrupted_leaves_the_old_file(tmp_path, error, wrote):
  final = tmp_path / "file"
  final.write_text("old")

  def interrupted():
    with paths.atomic_write(final) as temporary:
      if wrote:
        temporary.write_text("half")
      raise error

  with pytest.raises(error):
    interrupted()
  assert final.read_text() == "old"
  assert list(tmp_path.iterdir()) == [final]
