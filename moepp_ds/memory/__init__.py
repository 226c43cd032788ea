"""What a run needs of the memory of its devices and hosts, before anything is allocated."""

from moepp_ds.memory.check import check_fits
from moepp_ds.memory.plan import Group, Item, MemoryPlan, plan_memory
from moepp_ds.memory.room import Room, agreed_room

__all__ = ["Group", "Item", "MemoryPlan", "Room", "agreed_room", "check_fits", "plan_memory"]
