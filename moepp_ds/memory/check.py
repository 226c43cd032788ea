"""Whether a run fits, the arithmetic as a table, and the settings that would fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moepp_ds.config import Recipe, RecipeError
from moepp_ds.memory.plan import Item, MemoryPlan, Place, plan_memory, sizes_by_expert
from moepp_ds.memory.room import Room

_MOST_RANKS = 4096
"""Where the search for a sufficient number of ranks ends."""

_PLACES: tuple[Place, Place] = ("device", "host")
"""The table's columns."""

_OFFLOAD = {"device": "cpu", "pin_memory": True}


def check_fits(recipe: Recipe, config: Mapping[str, Any], world: int, room: Room) -> MemoryPlan:
    """The plan of a run on `world` ranks; RecipeError, with the arithmetic, when its sure part does not fit."""
    plan = plan_memory(recipe, config, world, on_cpu=room.device is None)
    if fits(plan, room) or not recipe.safety.check_memory:
        return plan
    settings = list(settings_that_fit(recipe, config, world, room))
    advice = "\n".join(f"  {setting}" for setting in settings)
    raise RecipeError(
        f"a rank of {world} needs more memory than there is:\n{table(plan, room)}\n"
        + (f"Each of these would fit:\n{advice}" if settings else "No number of ranks, nor offload, would make it fit")
        + "\n(safety.check_memory: false starts it all the same)"
    )


def fits(plan: MemoryPlan, room: Room) -> bool:
    """Whether what is surely needed is there; what is not known is taken to suffice."""
    if room.device is None:
        return room.host is None or plan.needed("device", "host") <= room.host
    return plan.needed("device") <= room.device and (room.host is None or plan.needed("host") <= room.host)


def settings_that_fit(recipe: Recipe, config: Mapping[str, Any], world: int, room: Room) -> Iterator[str]:
    """The least change of each kind with which the run fits: expert parallelism, offload, both, more ranks.

    More ranks are taken to be on more nodes like these.
    """
    ways = [n for n in range(recipe.parallel.expert_parallel + 1, world + 1) if _divides(recipe, n, world)]
    offloaded = _with_offload(config)
    # with fp16 the optimizer stays on the device: see `ds_config`
    can_move = offloaded != config and room.device is not None and recipe.train.precision != "fp16"
    for n in ways:
        if _fits(_spread(recipe, n), config, world, room):
            yield f"parallel.expert_parallel: {n}"
            break
    if can_move and _fits(recipe, offloaded, world, room):
        yield "the optimizer on the host (deepspeed: ds_configs/zero2_offload.json)"
    elif can_move:
        for n in ways:
            if _fits(_spread(recipe, n), offloaded, world, room):
                yield f"the optimizer on the host (ds_configs/zero2_offload.json) and parallel.expert_parallel: {n}"
                break
    sizes = sizes_by_expert(recipe)
    for more in range(2, _MOST_RANKS // world + 1):
        if _fits(recipe, config, world * more, room, sizes):
            yield f"{world * more} ranks"
            break


def _divides(recipe: Recipe, ways: int, world: int) -> bool:
    return world % ways == 0 and recipe.model.moe.num_ffn_experts % ways == 0


def _spread(recipe: Recipe, ways: int) -> Recipe:
    parallel = recipe.parallel.model_copy(update={"expert_parallel": ways})
    return recipe.model_copy(update={"parallel": parallel})


def _with_offload(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**config, "zero_optimization": {**config["zero_optimization"], "offload_optimizer": _OFFLOAD}}


def _fits(recipe: Recipe, config: Mapping[str, Any], world: int, room: Room, sizes: Any = None) -> bool:
    try:
        plan = plan_memory(recipe, config, world, on_cpu=room.device is None, sizes=sizes)
    except RecipeError:  # so many ranks cannot share the batch
        return False
    return fits(plan, room)


def table(plan: MemoryPlan, room: Room | None = None) -> str:
    """The plan as lines of text: every item, their sum, and what there is."""
    rows = [(item.name, item.bytes, item.place) for item in plan.items if _counts(item)]
    sums = [("in all", plan.needed(place), place) for place in _PLACES]
    lines = [_line(name, {place: size}) for name, size, place in rows]
    lines.append(_line("in all", {place: size for _, size, place in sums}))
    lines += [
        _line(f"not counted: {item.name}" if not item.sure else f"before: {item.name}", {item.place: item.bytes})
        for item in plan.items
        if not _counts(item)
    ]
    if room is not None:
        lines.append(_line("free", _free(room)))
    return "\n".join([f"  {'GiB of one rank':<40}{'device':>10}{'host':>10}", *lines])


def _counts(item: Item) -> bool:
    return item.sure and not item.at_start


def _free(room: Room) -> dict[Place, int]:
    free: dict[Place, int | None] = {"device": room.device, "host": room.host}
    return {place: size for place, size in free.items() if size is not None}


def _line(name: str, sizes: Mapping[Place, int]) -> str:
    cells = [f"{sizes[place] / 2**30:.3f}" if place in sizes else "" for place in _PLACES]
    return f"  {name:<40}{cells[0]:>10}{cells[1]:>10}".rstrip()
