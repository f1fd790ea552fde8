"""Which process of the world was told to stop."""


class DistributedSignalHandler:
    def signals_received(self) -> list[bool]:
        return [False]
