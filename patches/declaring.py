"""Short forms of the declarations: what all patches of Megatron have in common stands here once."""

from __future__ import annotations

from patches.manager import Patch, Signature

MEGATRON_VERSIONS = ">=0.12.1,<0.17"
"""Of megatron-core, on which the patches were checked. `megatron.training` has no version of its own."""


def megatron(
    target: str,
    factory: str,
    reason: str,
    signatures: tuple[Signature, ...],
    versions: str = MEGATRON_VERSIONS,
) -> Patch:
    """A patch of `megatron.<target>` by `ldt_schedules.<factory>`."""
    return Patch(
        target=f"megatron.{target}",
        factory=f"ldt_schedules.{factory}",
        reason=reason,
        package="megatron-core",
        versions=versions,
        signatures=signatures,
    )
