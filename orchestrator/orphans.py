"""Placement groups whose maker died: Ray keeps what an actor made until its job ends, and with it the CPUs and GPUs.

Ray Train makes a placement group for every fit, in a trial's driver. Where that process is killed nobody else knows of the
group, so the driver of the search asks Ray's own table, which says of every group whether its maker lives.
"""

from __future__ import annotations

import ray
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.util.placement_group import PlacementGroup, remove_placement_group


def remove_orphans() -> int:
    """Removes this job's placement groups whose maker, an actor, is dead; how many."""
    accessor = ray._private.state.state._connect_and_get_accessor()  # the public table tells everything but the maker
    job, count = ray.get_runtime_context().get_job_id(), 0
    for row in accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        by_actor = group.creator_actor_id not in (b"", ray.ActorID.nil().binary())  # of others Ray says the actor is dead
        ours = group.creator_job_id.hex() == job and not group.is_detached
        if ours and by_actor and group.creator_actor_dead and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            count += 1
    return count
