"""What the edge's console says before training starts."""

from __future__ import annotations

from ldt_schedules.megatron_lm.sites import Sites
from ldt_schedules.topology import Site


def description(sites: Sites) -> str:
    """Both sites, the layers of each stage and the schedule, a few lines.

    LDT  edge   1 process   TP 1  DP 1   layers 1 (head) + 1 (tail)
         cloud  2 processes TP 1  DP 1   layers 1, 1
         schedule ldt_1f1b
    """
    flags, topology = sites.flags, sites.topology
    head, *middle, tail = flags.layers
    layers = {Site.EDGE: f"{head} (head) + {tail} (tail)", Site.CLOUD: ", ".join(map(str, middle))}
    lines = []
    for site in Site:
        count, size = topology.world_size(site), topology.size(site)
        processes = f"{count} process{'' if count == 1 else 'es'}"
        lines.append(f"{site.value:6s} {processes:13s} TP {size.tensor}  DP {size.data}   layers {layers[site]}")
    lines.append(f"schedule {flags.plan or flags.schedule}")
    lines += [f"note: {note}" for note in flags.notes]
    return "LDT  " + "\n     ".join(lines)
