"""The progress bar that all scripts draw."""

from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  ProgressColumn,
  TextColumn,
  TimeRemainingColumn,
)


def progress_bar(
  *columns: ProgressColumn,
  console: Console | None = None,
  hidden: bool = False,
  **options: Any,
) -> Progress:
  """A bar on standard error; drawn on a terminal only.

  Args:
    *columns: what stands behind the bar; the count and the time left if none
      is given.
    console: where to draw, if not on a new one.
    hidden: draw nothing, on a terminal either.
    **options: of `rich.progress.Progress`.
  """
  stderr = console or Console(stderr=True)
  return Progress(
    TextColumn("{task.description}"),
    BarColumn(),
    *(columns or (MofNCompleteColumn(), TimeRemainingColumn())),
    console=stderr,
    disable=hidden or not stderr.is_terminal,
    **options,
  )
