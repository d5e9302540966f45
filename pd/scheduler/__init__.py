"""The scheduler: a pure state machine (`state.py`) inside an asyncio shell (`service.py`)."""
