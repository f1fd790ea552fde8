"""Flight files of a run that failed, as its processes would leave them."""

from __future__ import annotations

import json

from ldt_schedules.comm.flight_recorder import FORMAT
from ldt_schedules.comm.process_files import write_json
from ldt_schedules.planning import Layout, plan
from ldt_schedules.planning.formats import write_table

CAUSE = {
    "process": "edge rank 0",
    "text": "edge rank 0, step 3, action 6 `F s0 m2`: ValueError: sample 17 has no text",
    "step": 3,
    "index": 6,
    "action": "F s0 m2",
    "error": "ValueError",
}


def table_of(ranks=3, microbatches=6):
    return plan("ldt_1f1b", Layout.u(ranks), microbatches)


def flight(table, process, pipeline_rank, done, **changes):
    """The content of one process's file; it is at action `done`, waiting for what that takes."""
    site, _, site_rank = process.split()
    row = table.ranks[pipeline_rank]
    return {
        "format": FORMAT,
        "process": process,
        "site": site,
        "site_rank": int(site_rank),
        "pipeline_rank": pipeline_rank,
        "processes": len(table.ranks),
        "written_unix_s": 1.7e9 + pipeline_rank,
        "cause": CAUSE,
        "own_failure": process == CAUSE["process"],
        "step": 3,
        "steps_applied": 3,
        "table": json.loads(write_table(table, "json")),
        "done": done,
        "now": {"what": str(row[done]), "index": done, "waits_for": "RECV_F s1 m2 <-0", "since_s": 41.2},
        "last_heard_s": {"edge": 41.3, "cloud": 0.2},
        "events": [[1.7e9, 3, str(row[0]), "begin"], [1.7e9 + 1, 3, str(row[0]), "end"]],
        "stack": ["message_pump.py:88 wait", "executor.py:141 run_row", "loop.py:213 _step"],
        **changes,
    }


def write_flights(directory, flights):
    """One file a process."""
    directory.mkdir(parents=True, exist_ok=True)
    for one in flights:
        write_json(directory, one["process"], one)


def failed_run(directory, microbatches=6):
    """The edge failed while it read microbatch 2; the cloud's ranks waited for what would have come of it."""
    table = table_of(3, microbatches)
    rows = [[str(action) for action in row] for row in table.ranks]
    at_edge, at_first, at_second = rows[0].index("F s0 m2"), rows[1].index("F s1 m2"), rows[2].index("B s2 m0")
    edge = flight(table, "edge rank 0", 0, at_edge, stack=["corpus.py:61 sample", "loop.py:213 _step"])
    edge["now"] |= {"waits_for": None, "since_s": 0.1}
    first = flight(table, "cloud rank 0", 1, at_first)
    second = flight(table, "cloud rank 1", 2, at_second)
    second["now"]["waits_for"] = "RECV_B s2 m0 <-0"
    write_flights(directory, [edge, first, second])
    return table
