"""The task ``miniworld_qa`` before there is anything to ask."""

from experiments.miniworld.qa_offer import advice


class NotRendered:
    """Refuses to be loaded."""

    def __init__(self, config: dict | None = None) -> None:
        raise RuntimeError(f"miniworld_qa has no questions yet: {advice()}")
