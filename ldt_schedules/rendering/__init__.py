"""Pictures of schedules, simulated or measured."""
