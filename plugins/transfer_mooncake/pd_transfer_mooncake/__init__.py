"""Mooncake's transfer engine as a transfer backend of pd. `pd_transfer_mooncake.plugin` is what pd loads."""
