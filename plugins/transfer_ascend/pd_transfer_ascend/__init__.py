"""Ascend NPUs' memory fabric as a transfer backend of pd. `pd_transfer_ascend.plugin` is what pd loads."""
