"""Who may write to a shard set: one whole build (or `finish`), or any number of different tasks.

    OUT/.locks/set           held alone by a whole build, shared by tasks
    OUT/.locks/task-I        held by task I
    OUT/.locks/workers       shared by a worker while it writes; of task I: workers-I
    OUT/.locks/tasks         held for a moment while one task settles what all must agree on
    OUT/.locks/tasks.json    how many tasks there are, and of which list of files they take shares

Workers have locks of their own because those of a killed build live until they notice, a moment later; the
next build waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.atomic import clear_unfinished, write_atomically
from data_pipeline.document import DataError
from data_pipeline.locks import held, is_free
from data_pipeline.tasks import Task


def _folder(root: Path) -> Path:
    return root / ".locks"


@contextmanager
def whole_set(root: Path) -> Iterator[str]:
    """Have the set at `root` alone; yields the lock for its workers. What was unfinished is cleared away."""
    folder = _folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    with held(
        folder / "set",
        refusal=f"another build is writing to {root}; wait for it to end, or build into another folder",
    ):
        _wait_for(*folder.glob("workers*"))
        clear_unfinished(root)
        yield str(folder / "workers")


@contextmanager
def one_task(root: Path, task: Task, plan: str) -> Iterator[str]:
    """Be task `task` of a build into `root`; yields the lock for its workers.

    `plan` names what is shared out: tasks with other plans, or of another number, do not run side by side.
    """
    folder = _folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(
            held(
                folder / "set",
                shared=True,
                refusal=f"a whole build, or finish, is writing to {root}; wait for it to end",
            )
        )
        with held(folder / "tasks"):
            own = folder / f"task-{task.number}"
            stack.enter_context(
                held(own, refusal=f"task {task.number} is building into {root} already; wait for it to end")
            )
            _agree(folder, task, own, plan)
        workers = folder / f"workers-{task.number}"
        _wait_for(workers, folder / "workers")
        yield str(workers)


def _wait_for(*locks: Path) -> None:
    """Until the workers of killed builds have noticed."""
    for lock in sorted(locks):
        with held(lock):
            pass


def _agree(folder: Path, task: Task, own: Path, plan: str) -> None:
    """Refuse to run beside tasks that take shares in another way; when there are none, settle this way."""
    path = folder / "tasks.json"
    settled = _settled(path)
    ours = {"tasks": task.of, "plan": plan}
    if settled != ours:
        if not all(is_free(lock) for lock in folder.glob("task-*") if lock != own):
            raise DataError(
                f"task {task} would take another share than tasks that are building into {folder.parent} now: they"
                f" are {settled.get('tasks')} tasks, or see other raw files; wait for them to end, or start this one"
                " with the same n and the same files"
            )
        _wait_for(*folder.glob("workers*"))  # of killed tasks, whose files may be in this one's share now
        write_atomically(path, orjson.dumps(ours))


def _settled(path: Path) -> dict[str, Any]:
    try:
        return orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return {}


def number_of_tasks(root: Path) -> int | None:
    """How many tasks the set at `root` was last built by; None when by none."""
    return _settled(_folder(root) / "tasks.json").get("tasks")


@contextmanager
def settling(root: Path) -> Iterator[None]:
    """While settings are fixed or compared: one task at a time."""
    with held(_folder(root) / "tasks"):
        yield
