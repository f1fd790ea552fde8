"""Executes one row of a schedule table: torch only, no Megatron."""
