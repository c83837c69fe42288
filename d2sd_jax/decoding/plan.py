"""A decode config checked and made definite, before anything is fetched."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from d2sd_jax.config import (
  COMPARED,
  ROLES,
  DrafterConfig,
  TargetConfig,
  TreeConfig,
)
from d2sd_jax.decoding.answers import Request
from d2sd_jax.decoding.decode_config import DecodeConfig
from d2sd_jax.decoding.placement import put_drafter
from d2sd_jax.decoding.policies import POLICIES
from d2sd_jax.decoding.state import Models
from d2sd_jax.errors import UsageError, require
from d2sd_jax.io.drafter_format import (
  CONFIG_FILE,
  WEIGHTS_FILE,
  load_drafter_folder,
  read_drafter_config,
)
from d2sd_jax.io.models import (
  DEFAULT_TARGET,
  load_target,
  load_tokenizer,
  read_target_config,
)
from d2sd_jax.io.paths import find_checkpoint, user_path
from d2sd_jax.models.drafter import FusedDrafter
from d2sd_jax.models.target import LlamaTarget
from d2sd_jax.sampling import Sampling
from d2sd_jax.sharding import DECODING_AXES, TENSOR, make_mesh
from d2sd_jax.tensor_parallel import check_split

# `ChatTokenizer.chat_ids` of the default target, known without its file.
DEFAULT_CHAT_IDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What will be run.

  Attributes:
    config: the config it follows, its dtype decided.
    target: shape of the target.
    drafters: folders of as many drafters as the modes need.
    trees: the modes to run, in order, and the static tree sizes of each.
    chosen: how mode `auto` came to its choice, in words; else `None`.
    mesh: the devices; `None` is one.
  """

  config: DecodeConfig
  target: TargetConfig
  drafters: tuple[Path, ...]
  trees: Mapping[str, TreeConfig]
  chosen: str | None = None
  mesh: Mesh | None = None

  @property
  def sampling(self) -> Sampling:
    """How the target chooses."""
    c = self.config
    top_k = min(c.top_k, self.target.vocab_size)
    return Sampling.create(c.temperature, top_k, c.top_p, c.seed)

  @property
  def devices(self) -> str:
    """What it runs on, in words."""
    kind = jax.devices()[0].device_kind
    return kind if self.mesh is None else f"{self.mesh.size} x {kind}"

  def check_context(self, requests: Sequence[Request]) -> None:
    """Raises `UsageError` for a prompt whose answer might not fit."""
    c, context = self.config, self.target.max_length
    for i, request in enumerate(requests):
      require(
        len(request.tokens) + c.max_new_tokens <= context,
        f"prompt {i + 1} tokens",
        len(request.tokens),
        f"at most {context - c.max_new_tokens}, the target's context of"
        f" {context} less max_new_tokens={c.max_new_tokens}",
      )

  def load_drafters(self) -> tuple[FusedDrafter, ...]:
    """The drafters' weights; a `UsageError` where a file is damaged."""
    return tuple(map(self._load_drafter, self.drafters))

  def _load_drafter(self, folder: Path) -> FusedDrafter:
    dtype = self.config.dtype or "float32"
    drafter = load_drafter_folder(folder, self.target, dtype)
    return put_drafter(drafter, self.mesh, split=self.config.shard_drafters)

  def load_target(self) -> LlamaTarget:
    """The target's weights; a `UsageError` where a file is damaged."""
    dtype = self.config.dtype or "float32"
    return load_target(self.config.target, dtype, mesh=self.mesh)

  def role_warnings(self, drafters: Sequence[FusedDrafter]) -> list[str]:
    """A line for each drafter that was trained for the other's place.

    Drafter 1 in both places is a fair experiment (the paper makes it), so
    this is no mistake; a swapped pair most likely is.
    """
    names = ("drafter", "vp_drafter")
    rows = zip(names, ROLES, drafters, strict=False)
    return [
      f"warning: {name}={getattr(self.config, name)!r}: trained as"
      f" {drafter.config.training_mode!r}, expected {role!r}"
      for name, role, drafter in rows
      if drafter.config.training_mode != role
    ]

  def models(
    self, mode: str, target: LlamaTarget, drafters: Sequence[FusedDrafter]
  ) -> Models:
    """The target and the drafters that one of the modes uses."""
    used = tuple(drafters[: POLICIES[mode].num_drafters])
    models = Models(target=target, drafters=used, mesh=self.mesh)
    int8 = used and self.config.drafter_weights == "int8"
    return models.with_int8_drafting() if int8 else models


def make_plan(config: DecodeConfig) -> Plan:
  """Checks everything that small files and numbers can tell.

  Args:
    config: what is wanted.

  Raises:
    UsageError: a file is missing or damaged, a drafter does not fit the
      target, or a size does not fit another.
  """
  # `auto` may choose any; `d2sd` stands for it until it has.
  groups = {"compare": COMPARED, "auto": ("d2sd",)}
  modes = groups.get(config.mode, (config.mode,))
  target = read_target_config(config.target)
  require(
    config.max_new_tokens < target.max_length,
    "max_new_tokens",
    config.max_new_tokens,
    f"less than the target's context of {target.max_length}",
  )
  mesh = None
  if config.mesh is not None or jax.process_count() > 1:
    mesh = make_mesh(config.mesh, DECODING_AXES)
    # Or noise would depend on how many ids a device has.
    alike = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    require(alike, "jax_threefry_partitionable", alike, "True, with a mesh")
  size = 1 if mesh is None else mesh.shape[TENSOR]
  check_split(target, size)
  num_drafters = max(POLICIES[mode].num_drafters for mode in modes)
  names = (("drafter", config.drafter), ("vp_drafter", config.vp_drafter))
  folders = tuple(
    _drafter_folder(name, field) for field, name in names[:num_drafters]
  )
  shapes = [
    _check_drafter(path, target, config.target, field)
    for path, (field, _) in zip(folders, names, strict=False)
  ]
  for shape in shapes if config.shard_drafters else ():
    check_split(shape, size, "shard_drafters=True: mesh")
  second = config.second_block_size or 2
  expected = f"below the target's context of {target.max_length}"
  require(second < target.max_length, "second_block_size", second, expected)
  default = shapes[0].block_size if shapes else TreeConfig().block_size
  block_size = config.block_size or default
  require(
    block_size < target.max_length,
    "block_size",
    block_size,
    f"less than the target's context of {target.max_length}",
  )
  on_cpu = jax.default_backend() == "cpu"
  dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
  return Plan(
    config=dataclasses.replace(config, dtype=dtype),
    target=target,
    drafters=folders,
    trees={mode: _tree(mode, config, block_size) for mode in modes},
    mesh=mesh,
  )


def _tree(mode: str, config: DecodeConfig, block_size: int) -> TreeConfig:
  """Tree sizes of one mode; those it has no use for are not even checked.

  They have one value instead, so that one program serves all configs.
  """
  wanted = {**dataclasses.asdict(config), "block_size": block_size}
  if config.num_branches is None:
    wanted["num_branches"] = min(TreeConfig().num_branches, block_size - 1)
  read = {field: wanted[field] for field in POLICIES[mode].reads}
  return TreeConfig(**{"block_size": 2, "num_branches": 0, **read})


def _drafter_folder(name: str, field: str) -> Path:
  """A drafter by its folder, by either file in it, or by a shipped name."""
  path = user_path(name)
  if path.name in (CONFIG_FILE, WEIGHTS_FILE) and path.is_file():
    return path.parent
  return find_checkpoint(name, field)


def _check_drafter(
  folder: Path, target: TargetConfig, target_name: str, field: str
) -> DrafterConfig:
  """The drafter's shape, if it fits the target and its mask id is free."""
  config = read_drafter_config(folder, target, field)
  weights = folder / WEIGHTS_FILE
  require(
    weights.is_file(), field, str(folder), f"a folder with {WEIGHTS_FILE}"
  )
  chat_ids = (
    DEFAULT_CHAT_IDS
    if target_name == DEFAULT_TARGET
    else load_tokenizer(target_name).chat_ids
  )
  if config.mask_token_id in chat_ids:
    raise UsageError(
      f"{folder / CONFIG_FILE}: mask_token_id={config.mask_token_id}: expected"
      f" an id that the target never produces; {list(chat_ids)} mark its turns"
    )
  return config
