"""Computing a recording on Dask workers: processes of this machine, or a cluster that is there already.

The client (`client`) holds the slabs' locks, hands out bundles of parts, and commits. A worker (`worker`) computes a
part; if the part is a whole segment, it also encodes and writes the states, so that only the series travel. What a
worker that dies had in hand is computed again by another.
"""

from trajstore.recording.workers.client import fill
from trajstore.recording.workers.cluster import Scheduler, connected, connected_to, one_scheduler
from trajstore.recording.workers.job import Job

__all__ = ["Job", "Scheduler", "connected", "connected_to", "fill", "one_scheduler"]
